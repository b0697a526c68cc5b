"""The three commands, typed as a user types them."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import numpy
import onnxruntime
import pytest
from commandline import TINY, command

import edgekit

SCHEMAS = Path(edgekit.__file__).parent / "schemas"


def test_a_run_has_all_that_the_contract_names(workplace: Path):
    run = workplace / "runs/tiny-1"
    assert (workplace / "runs/latest").resolve() == run.resolve()
    info = json.loads((run / "run.json").read_text())
    assert info["status"] == "finished"
    assert set(info) >= {"seed", "versions", "device", "threads", "data", "teacher", "metrics"}
    assert len((run / "log.jsonl").read_text().splitlines()) == 4
    assert (run / "curves.png").read_bytes()[:4] == b"\x89PNG"
    for name in ("onnx-fp32", "onnx-int8", "torchscript-fp32"):
        record = json.loads((run / "artifacts" / name / "artifact.json").read_text())
        jsonschema.validate(record, json.loads((SCHEMAS / "artifact.json").read_text()))
        assert record["against_float"]["agreement"] > 0.9


def test_export_again_is_already_there(workplace: Path):
    done = command("export", "--int8", "--json", cwd=workplace)
    assert done.returncode == 0
    document = json.loads(done.stdout)
    assert [one["written"] for one in document["artifacts"]] == [False, False, False]
    assert done.stderr.count("already there") == 3


@pytest.fixture(scope="module")
def verified(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    """The document, and the copy of the workplace where it was made, its archive as adversarial.npz."""
    place = tmp_path_factory.mktemp("line") / "workplace"
    shutil.copytree(workplace, place, symlinks=True)
    arguments = ["--attack", "pgd5,fgsm", "--samples", "80", "--save-adversarial", "adversarial.npz", "--json"]
    done = command("verify", *arguments, cwd=place)
    document = json.loads(done.stdout)
    assert done.returncode == {"survived": 0, "lost": 1, "inconclusive": 3}[document["verdict"]]
    return document, place


def test_the_verdict_is_as_the_contract_says(verified: tuple[dict, Path]):
    document, place = verified
    jsonschema.validate(document, json.loads((SCHEMAS / "verdict.json").read_text()))
    kept = json.loads((place / "runs/tiny-1/verdicts/1/verdict.json").read_text())
    assert kept == document
    names = [one["name"] for one in document["artifacts"]]
    assert names == ["onnx-fp32", "onnx-int8", "torchscript-fp32"]
    int8 = document["artifacts"][1]
    assert set(int8["attacks"][0]["sources"]) == {"float", "twin"}
    assert int8["twin"] == {"agreement": 1.0, "max_abs_difference": 0.0}


def test_the_archive_replayed_with_plain_onnxruntime_fools_exactly_where_it_says(verified: tuple[dict, Path]):
    document, place = verified
    with numpy.load(place / "adversarial.npz") as archive:
        images, labels = archive["images"], archive["labels"]
        for one in document["artifacts"]:
            if one["format"] != "onnx":
                continue
            adversarial, fooled = archive[f"{one['name']}/adversarial"], archive[f"{one['name']}/fooled"]
            assert adversarial.dtype == numpy.float32
            assert numpy.abs(adversarial - images).max() <= document["epsilon"] + 1e-6
            assert adversarial.min() >= 0
            assert adversarial.max() <= 1
            session = onnxruntime.InferenceSession(place / "runs/tiny-1" / one["file"])
            logits = session.run(None, {session.get_inputs()[0].name: adversarial})[0]
            assert isinstance(logits, numpy.ndarray)
            assert (logits.argmax(1) != labels).tolist() == fooled.tolist()
            assert 1 - fooled.mean() == pytest.approx(one["robust_accuracy"]["value"], abs=1e-12)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(workplace: Path, tmp_path: Path):
    """Killed three times at random moments; the undisturbed run is the workplace's own."""
    (tmp_path / "tiny.toml").write_text(TINY)
    arguments = [sys.executable, "-m", "edgekit", "distill", "tiny.toml", "--resume"]
    moments, state = random.Random(0), tmp_path / "runs/tiny-1/checkpoint/state.pt"
    for kill in range(3):
        process = subprocess.Popen(arguments, cwd=tmp_path, stderr=subprocess.DEVNULL, start_new_session=True)
        before, deadline = state.stat().st_mtime_ns if state.exists() else 0, time.monotonic() + 200
        while process.poll() is None and time.monotonic() < deadline:
            if kill == 0 or (state.exists() and state.stat().st_mtime_ns != before):
                break  # the first kill may come before anything was saved, the others after another epoch
            time.sleep(0.05)
        time.sleep(moments.uniform(0, 4 if kill == 0 else 1))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = command("distill", "tiny.toml", "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    runs = sorted((tmp_path / "runs").glob("tiny-*"))
    finished = [run for run in runs if (run / "student.safetensors").exists()]
    assert len(finished) == 1
    ours, undisturbed = (json.loads((run / "run.json").read_text()) for run in (finished[0], workplace / "runs/tiny-1"))
    assert ours["student_sha256"] == undisturbed["student_sha256"]
    again = command("distill", "tiny.toml", "--resume", cwd=tmp_path)
    assert again.returncode == 0
    assert "finished already" in again.stderr
