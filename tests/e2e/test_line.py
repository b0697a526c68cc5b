"""The three commands, typed as a user types them."""

import json
import os
import random
import shlex
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
from commandline import LEARNT, TINY, command, interruptible

import edgekit

SCHEMAS = Path(edgekit.__file__).parent / "schemas"


def test_a_run_has_all_that_the_contract_names(workplace: Path):
    run = workplace / "runs/tiny-1"
    assert (workplace / "runs/latest").resolve() == run.resolve()
    info = json.loads((run / "run.json").read_text())
    assert info["status"] == "finished"
    assert info["metrics"]["robust_accuracy"] > 0.3  # or what follows is said of a student that learnt nothing
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
    (tmp_path / "tiny.toml").write_text(LEARNT)
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


def test_ctrl_c_while_the_teacher_trains_prints_the_command_that_finishes_the_run(tmp_path: Path):
    cache = {"EDGEKIT_CACHE": str(tmp_path / "cache")}
    (tmp_path / "teacher.toml").write_text(TINY)
    taught = TINY.replace('"sat"', '"rslad"').replace("epochs = 4", "epochs = 1")
    (tmp_path / "taught.toml").write_text(taught + '\n[teacher]\nrecipe = "teacher.toml"\n')
    arguments = [sys.executable, "-m", "edgekit", "distill", "taught.toml"]
    process = subprocess.Popen(
        arguments,
        cwd=tmp_path,
        env=os.environ | cache,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=interruptible,
    )
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("cache/teachers/*/log.jsonl")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    said = process.communicate(timeout=100)[1].strip().splitlines()
    assert process.returncode == 130
    assert len(said) == 3, said  # the teacher is trained first; its epoch; and one line of the interruption
    assert said[1].startswith("teacher teacher: epoch 1 of 4")  # its folder's name is a digest
    assert json.loads((tmp_path / "runs/taught-1/run.json").read_text())["status"] == "interrupted"
    words = shlex.split(said[-1].partition("Continue with: edgekit ")[2])
    assert words == ["distill", "runs/taught-1/recipe.toml", "--run", "runs/taught-1", "--resume"]
    assert command(*words, cwd=tmp_path, **cache).returncode == 0
    assert (tmp_path / "runs/latest").readlink() == Path("taught-1")


OWN = """
import torch
from torch import nn

def make(classes, channels, greedy=False):
    stem = nn.Conv2d(channels, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), Greedy() if greedy else nn.Identity()
    return nn.Sequential(*stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))

class Greedy(nn.Module):
    def forward(self, x):
        return x if len(x) == 1 else torch.empty(2**58, dtype=torch.uint8)
"""


def test_your_own_student_stands_in_the_working_directory(tmp_path: Path):
    """With the installed command, which does not look there by itself."""
    (tmp_path / "own.py").write_text(OWN)
    own = TINY.replace('architecture = "mobilenetv2"\nwidth = 0.25', 'architecture = "own:make"').replace("= 4", "= 1")
    (tmp_path / "mine.toml").write_text(own)
    installed = [str(Path(sys.executable).parent / "edgekit")]
    for arguments, code in (
        (["distill", "mine.toml"], 0),
        (["export", "--int8"], 0),
        (["distill", "mine.toml", "--set", "student.options.greedy=true"], 4),
    ):
        done = subprocess.run([*installed, *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "mine.toml: out of memory. Lower train.batch_size" in done.stderr.strip().splitlines()[-1]
