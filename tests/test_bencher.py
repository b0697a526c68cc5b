"""`edgekit bench`: what is measured, of what and in which order. No test asserts a time that a machine took."""

import json
import statistics
from pathlib import Path
from typing import Any

import jsonschema
import numpy
import pytest
import torch
from benched import artifact, judge, plain, run
from commandline import command
from onnx.helper import make_node
from typer.testing import CliRunner

import edgekit
from edgekit import bencher, cli, machine
from edgekit.errors import EdgekitError
from edgekit.lineup import contenders

SCHEMA = json.loads((Path(edgekit.__file__).parent / "schemas/bench.json").read_text())


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a run of three files; a cold start happens once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bencher, "COLD", 1)
    monkeypatch.setattr(machine, "cores", lambda: 2)
    run(Path("runs/a"), "onnx-fp32", "onnx-int8", "torchscript-fp32")
    Path("runs/latest").symlink_to("a")
    return tmp_path


def test_the_document_holds_every_file_under_every_number_of_threads_and_batch(place: Path):
    judge(Path("runs/a/verdicts"), Path("runs/a/artifacts/onnx-int8/model.onnx"), 90)
    before = torch.get_num_threads()
    document = edgekit.bench(batch=5, rounds=7)
    assert torch.get_num_threads() == before
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(document, SCHEMA)
    assert (document["batches"], document["threads"]) == ([1, 5], [1, 2])
    for one in document["artifacts"]:
        assert [(cell["threads"], cell["batch"]) for cell in one["latency"]] == [(1, 1), (1, 5), (2, 1), (2, 5)]
        assert all(cell["rounds"] == 7 for cell in one["latency"])
        for cell in one["latency"]:
            assert cell["images_per_second"] == pytest.approx(cell["batch"] / cell["median"])
            assert cell["median"] <= cell["p90"] <= cell["p99"]
        single = {cell["threads"]: cell["median"] for cell in one["latency"] if cell["batch"] == 1}
        assert one["fastest"] == {"threads": min(single, key=single.__getitem__), "median": min(single.values())}
        assert one["throughput"]["images_per_second"] == max(cell["images_per_second"] for cell in one["latency"])
        assert [each["batch"] for each in one["peak_memory"]] == [1, 5]
        assert one["bytes"] == (Path("runs/a") / one["file"]).stat().st_size
        assert one["cold_start"]["threads"] == 2
    first, second, third = document["artifacts"]
    assert sum(first["operators"]["float"].values()) >= 3 and "Conv" in str(first["operators"]["float"])
    assert third["operators"]["float"]["aten::relu"] == 1
    assert (second["front"], second["judged"]["samples"]) == (["latency", "size"], 200)
    assert "robust_accuracy" not in first and first["front"] == []
    kept = json.loads(Path("runs/a/bench.json").read_text())
    assert kept == json.loads(json.dumps(document))
    assert Path("runs/a/bench.png").read_bytes().startswith(b"\x89PNG")


def test_the_operators_are_those_of_artifact_json_where_it_has_them(place: Path):
    path = Path("runs/a/artifacts/onnx-int8/artifact.json")
    said = {"int8": 67, "float": {"Div": 1}}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"operators": said}))
    (one,) = contenders([path.parent])
    assert bencher._operators(one) == said


def test_several_runs_and_files_of_no_run_are_kept_wherever_they_came_from(place: Path):
    run(Path("runs/b"), "onnx-fp32")
    plain(Path("plain.onnx"))
    document = edgekit.bench(["runs/b", "runs/a/artifacts/onnx-int8", "plain.onnx"], batch=1, threads=1, rounds=2)
    jsonschema.validate(document, SCHEMA)
    assert [one["name"] for one in document["artifacts"]] == ["b/onnx-fp32", "a/onnx-int8", "plain.onnx"]
    assert document["batches"] == [1] and [len(one["peak_memory"]) for one in document["artifacts"]] == [1, 1, 1]
    assert "judged_under" not in document
    for folder in ("runs/a", "runs/b", "edgekit-bench"):
        assert json.loads(Path(folder, "bench.json").read_text()) == json.loads(json.dumps(document))
        assert Path(folder, "bench.png").is_file()


def test_files_of_other_layouts_and_types_get_what_they_take(place: Path):
    nodes = [make_node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2]), make_node("Flatten", ["t"], ["y"])]
    plain(Path("fixed.onnx"), nodes, batch=4)
    document = edgekit.bench("fixed.onnx", batch=6, threads="1", rounds=2)
    assert document["artifacts"][0]["input"] == [3, 8, 8]


class Turned:
    """In place of every file: what it was asked, on a clock that it alone moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.asked = 0.0, []
        monkeypatch.setattr(machine.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(bencher.judge, "open", self.open)
        cold = {"seconds": 0.25, "memory": [1000, 3000]}
        monkeypatch.setattr(bencher, "cold_start", lambda one, batch, threads: cold)

    def open(self, what: Any, *, threads: int, isolated: bool):
        assert not isolated and torch.get_num_threads() == threads

        def model(images: torch.Tensor) -> None:
            self.asked.append((what.name, threads, len(images)))
            # Slower from call to call; the int8 file is twice as fast and two threads are slower.
            self.now += len(self.asked) * threads * (0.5 if "int8" in what.name else 1.0)

        return model


def test_files_take_turns_and_times_become_medians_and_percentiles(place: Path, monkeypatch: pytest.MonkeyPatch):
    turned = Turned(monkeypatch)
    document = edgekit.bench(batch=2, rounds=9)
    # 14 rounds, of which 5 warm up, for each of four combinations; three files in each round.
    assert len(turned.asked) == 3 * 14 * 4
    names = [name for name, _, _ in turned.asked]
    assert all(sorted(names[turn : turn + 3]) == sorted(set(names)) for turn in range(0, 168, 3))
    assert len({tuple(names[turn : turn + 3]) for turn in range(0, 168, 3)}) > 3
    assert [asked[1:] for asked in turned.asked[::42]] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    for one in document["artifacts"]:
        calls = [1 + call for call, name in enumerate(names) if name == one["name"]]
        for number, cell in enumerate(one["latency"]):
            counted = calls[14 * number + 5 : 14 * number + 14]
            seconds = [call * cell["threads"] * (0.5 if "int8" in one["name"] else 1.0) for call in counted]
            assert cell["median"] == pytest.approx(statistics.median(seconds))
            for key, percent in (("p90", 90), ("p99", 99)):
                expected = numpy.percentile(seconds, percent, method="inverted_cdf")
                assert cell[key] == pytest.approx(expected)
        assert one["fastest"]["threads"] == 1
        assert one["cold_start"] == {"seconds": 0.25, "threads": 2}
        assert one["peak_memory"] == [{"batch": 1, "bytes": 1000}, {"batch": 2, "bytes": 3000}]


def test_rounds_end_early_where_files_are_slow(place: Path, monkeypatch: pytest.MonkeyPatch):
    Turned(monkeypatch)
    document = edgekit.bench(batch=1, threads=1, rounds=100)
    assert {cell["rounds"] for one in document["artifacts"] for cell in one["latency"]} == {bencher.FEWEST}


def test_only_comparable_files_can_be_on_the_front(place: Path, monkeypatch: pytest.MonkeyPatch):
    Turned(monkeypatch)
    made = run(Path("runs/c"), "onnx-fp32", "onnx-fp32-x", "onnx-int8", "onnx-int8-x") / "artifacts"
    for name, robust, attack in (
        ("onnx-fp32", 100, "pgd20"),
        ("onnx-fp32-x", 99, "pgd20"),
        ("onnx-int8", 95, "pgd20"),
        ("onnx-int8-x", 199, "fgsm"),
    ):
        judge(Path("runs/c/verdicts"), made / name / "model.onnx", robust, attacks=[attack])
    document = edgekit.bench("runs/c", batch=1, threads=1, rounds=2)
    jsonschema.validate(document, SCHEMA)
    assert document["judged_under"]["attacks"] == ["pgd20"]
    fronts = {one["name"]: one["front"] for one in document["artifacts"]}
    # onnx-fp32 is the smallest by a byte and the best; onnx-int8 is faster than it.
    assert fronts == {
        "onnx-fp32": ["latency", "size"],
        "onnx-fp32-x": [],
        "onnx-int8": ["latency"],
        "onnx-int8-x": [],
    }


def test_a_file_that_its_runtime_refuses_or_dies_of_is_one_sentence(place: Path, monkeypatch: pytest.MonkeyPatch):
    plain(Path("odd.onnx"), [make_node("Reshape", ["x", "s"], ["y"])], s=numpy.array([7], "int64"))
    with pytest.raises(EdgekitError, match=r"odd\.onnx: its runtime fails") as caught:
        edgekit.bench("odd.onnx", threads=1, rounds=2)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    plain(Path("plain.onnx"))
    for status, words in (("9", "was killed by SIGKILL. Memory"), ("11", "was killed by SIGSEGV")):
        killer = Path("killer")
        killer.write_text(f"#!/bin/sh\nkill -{status} $$\n")
        killer.chmod(0o755)
        monkeypatch.setattr(bencher.sys, "executable", str(killer.resolve()))
        with pytest.raises(EdgekitError, match=words):
            edgekit.bench("plain.onnx", threads=1, rounds=2)


def test_numbers_of_threads_are_powers_of_two_and_all_cores(monkeypatch: pytest.MonkeyPatch):
    for cores in range(1, 70):
        powers = [2**power for power in range(8) if 2**power <= cores]
        assert bencher.counted(cores) == sorted({*powers, cores})
    monkeypatch.setattr(machine, "cores", lambda: 8)
    assert bencher._threads(None) == [1, 2, 4, 8]
    assert bencher._threads("4,1,4") == bencher._threads([1, 4]) == [1, 4]
    assert bencher._threads(3) == [3]
    for wrong in ("0", "9", "", "many", "1,,2"):
        with pytest.raises(EdgekitError, match="--threads"):
            bencher._threads(wrong)


def test_the_command_prints_a_table_or_one_document(place: Path):
    artifact(Path("kept/onnx-int8"), 2)
    arguments = ["bench", "kept/onnx-int8", "--batch", "3", "--threads", "1", "--rounds", "2"]
    done = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert "batch 3, ms" in done.stdout and "not verified" in done.stdout
    assert "Kept in edgekit-bench" in done.stderr
    assert done.stderr.splitlines()[-1] == "Next: edgekit verify kept/onnx-int8/model.onnx --data FOLDER"
    jsonschema.validate(json.loads(CliRunner().invoke(cli.app, [*arguments, "--json"]).stdout), SCHEMA)
    wrong = command("bench", "gone", cwd=place)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "edgekit: gone: there is no such run, artifact or file\n"


def test_impossible_numbers_are_refused_before_anything_is_opened():
    for options in ({"batch": 0}, {"rounds": 0}, {"threads": 0}):
        with pytest.raises(EdgekitError, match=f"--{next(iter(options))} 0"):
            edgekit.bench("gone", **options)
