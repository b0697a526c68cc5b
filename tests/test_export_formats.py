"""Formats beyond the core: what is left out and refused without their packages, and each of them whole with them."""

import json
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import numpy
import onnx
import pytest
import torch
from test_exporter import make

import edgekit
from edgekit import artifact, data, exporter, jobs, judge, models, runs, twin
from edgekit.bencher import bench
from edgekit.classifier import Wrapped, predict
from edgekit.errors import EdgekitError
from edgekit.exporter import export
from edgekit.files import sha256
from edgekit.formats import FORMATS
from edgekit.inspector import inspect
from edgekit.jobs import listed
from edgekit.recipe import read
from edgekit.verifier import verify

needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed: make everything")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    make(folder / "runs/small-1")
    (folder / "runs/latest").symlink_to("small-1")
    return folder


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[runs.Run, dict[str, Any]]]:
    """The run with every precision of OpenVINO, and the document: read-only; its folder is the working directory."""
    folder = tmp_path_factory.mktemp("whole") / "work"
    shutil.copytree(place, folder, symlinks=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        document = export(int8=True, fp16=True, formats="openvino", ptq="plain")
        yield runs.Run(Path("runs/small-1")), document


def names(made: list[jobs.Job]) -> list[str]:
    return [job.name for job in made]


def test_all_is_what_can_be_written_here_and_the_rest_is_named(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(jobs, "find_spec", lambda package: package)
    everything = listed(["all", "onnx"], True, True, None)
    assert names(everything) == [
        *("onnx-fp32", "onnx-int8", "onnx-fp16", "torchscript-fp32"),
        *("openvino-fp32", "openvino-int8", "openvino-fp16"),
        *("executorch-fp32", "executorch-int8"),
        *(f"{name}-{kind}" for name in ("litert", "ncnn", "tensorrt", "coreml") for kind in ("fp32", "int8", "fp16")),
    ]
    said = capsys.readouterr().err
    assert "torchscript-fp16 is left out: this version writes torchscript in fp32" in said
    assert "torchscript-int8 is left out" in said and "openvino" not in said
    core = ("torch", "onnx", "onnxscript", "onnxruntime")
    monkeypatch.setattr(jobs, "find_spec", lambda package: package if package in core else None)
    assert names(listed("all", True, False, "a")) == ["onnx-fp32-a", "onnx-int8-a", "torchscript-fp32-a"]
    said = " ".join(capsys.readouterr().err.split())
    assert "openvino is left out: it needs the package openvino. Run: pip install 'edgekit[openvino]'" in said


def test_a_format_that_is_named_is_never_left_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jobs, "find_spec", lambda package: None if package == "openvino" else package)
    with pytest.raises(EdgekitError, match=r"openvino needs the package openvino. Run: pip install") as caught:
        listed("onnx,openvino", True, False, None)
    assert caught.value.exit_code == 4


@needs_openvino
def test_openvino_in_every_precision_answers_as_the_student(whole: tuple[runs.Run, dict[str, Any]]):
    run, document = whole
    assert [one["name"] for one in document["artifacts"]] == ["openvino-fp32", "openvino-int8", "openvino-fp16"]
    schema = json.loads((Path(edgekit.__file__).parent / "schemas/artifact.json").read_text())
    student = models.load(run.student, factory=read(run.recipe_file).student.architecture)
    images = data.load(read(run.recipe_file).data).test.floats()
    expected = predict(student, images)
    for one, difference, agreement in zip(document["artifacts"], (1e-4, 1.0, 0.01), (1, 0.99, 1), strict=True):
        written = artifact.load(run.artifacts / one["name"])
        jsonschema.validate(written.record, schema)
        answered = predict(judge.open(written, threads=1), images)  # in a child process
        assert (answered - expected).abs().max() < difference
        assert (answered.argmax(1) == expected.argmax(1)).double().mean() >= agreement
        assert written.bytes == sum((written.folder / name).stat().st_size for name in ("model.xml", "model.bin"))
    sizes = {one["precision"]: artifact.load(run.artifacts / one["name"]).path for one in document["artifacts"]}
    weights = {precision: path.with_suffix(".bin").stat().st_size for precision, path in sizes.items()}
    assert weights["fp16"] < 0.6 * weights["fp32"] and weights["int8"] < 0.5 * weights["fp32"]
    operators = document["artifacts"][1]["operators"]
    assert operators["int8"] >= 3 and "Convolution" not in operators["float"]


@needs_openvino
def test_an_int8_file_has_its_graph_beside_it_for_gradients(whole: tuple[runs.Run, dict[str, Any]]):
    run, _ = whole
    folder = run.artifacts / "openvino-int8"
    graph = artifact.load(folder).graph
    assert graph == folder / "twin.onnx"
    images = data.load(read(run.recipe_file).data).test.floats()
    copy, file = twin.open(graph), judge.open(artifact.load(folder), threads=1)
    with torch.no_grad():
        copied, answered = copy(images), file(images)
    assert copied.argmax(1).eq(answered.argmax(1)).double().mean() >= 0.99
    assert (copied - answered).abs().mean() < 1e-3  # where a tie falls the other way, a step of the grid
    document = verify(folder, attack="pgd5", samples=150)
    (judged,) = document["artifacts"]
    assert judged["twin"]["agreement"] >= 0.99
    assert {"float", "twin"} <= set(judged["attacks"][0]["sources"])
    assert judged["bytes"] == artifact.load(folder).bytes


@needs_openvino
def test_a_graph_that_is_not_the_file_makes_its_verdict_inconclusive(whole: tuple[runs.Run, dict[str, Any]], tmp_path):
    run, _ = whole
    folder = tmp_path / "runs/small-1"
    shutil.copytree(run.folder, folder, symlinks=True)
    spoiled = folder / "artifacts/openvino-int8/twin.onnx"
    graph = onnx.load(spoiled)
    # Other steps for the weights of every channel: a graph that opens and answers.
    scales = [held for held in graph.graph.initializer if held.data_type == onnx.TensorProto.FLOAT and held.dims]
    for held in scales:
        values = onnx.numpy_helper.to_array(held)
        drawn = numpy.random.default_rng(0).uniform(0.2, 5, values.shape).astype(numpy.float32)
        held.CopyFrom(onnx.numpy_helper.from_array(values * drawn, held.name))
    onnx.save(graph, spoiled)
    record = folder / "artifacts/openvino-int8/artifact.json"
    document = json.loads(record.read_text())
    for file in document["files"]:
        if file["path"] == "twin.onnx":
            file |= {"bytes": spoiled.stat().st_size, "sha256": sha256(spoiled)}
    record.write_text(json.dumps(document))
    verdict = verify(folder / "artifacts/openvino-int8", attack="pgd5", samples=60)
    (judged,) = verdict["artifacts"]
    assert not {check["name"]: check["passed"] for check in judged["checks"]}["twin_fidelity"]
    assert judged["twin"]["agreement"] < 0.99
    assert verdict["verdict"] == judged["verdict"] == "inconclusive" and "twin_fidelity" in judged["why"]


@needs_openvino
def test_nothing_is_said_of_how_its_kernels_sum(whole: tuple[runs.Run, dict[str, Any]], capsys):
    """The proof is of the order in which ONNX Runtime's kernels pair weights."""
    run, _ = whole
    exporter._tell(artifact.load(run.artifacts / "openvino-int8"))
    said = capsys.readouterr().err
    assert "OpenVINO runs" in said and "saturate" not in said and "arithmetics" not in said


def test_the_command_to_continue_asks_for_the_same():
    place = runs.Run(Path("runs/a"))
    about = ("plain", False, None, True, False, ["qat.epochs=1"], "openvino", "b", False)
    words = "edgekit export runs/a --int8 --fp16 --qat --set qat.epochs=1 --ptq plain --format openvino --label b"
    assert jobs.typed(place, True, *about) == words


@needs_openvino
def test_two_exports_are_the_same_bytes_and_tell_nothing_of_this_machine(whole: Any, tmp_path: Path):
    run, _ = whole
    student = models.load(run.student, factory=read(run.recipe_file).student.architecture)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        FORMATS["openvino"].write(student, tmp_path / name, {"classes": '["<&>"]'})
    for file in ("model.xml", "model.bin"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert str(tmp_path.parent).encode() not in (tmp_path / "a/model.xml").read_bytes()
    assert b".onnx" not in (tmp_path / "a/model.xml").read_bytes()


@needs_openvino
def test_weights_of_another_file_are_refused(whole: Any, tmp_path: Path):
    run, _ = whole
    shutil.copy(run.artifacts / "openvino-fp32/model.xml", tmp_path)
    whole_weights = bytearray((run.artifacts / "openvino-fp32/model.bin").read_bytes())
    whole_weights[len(whole_weights) // 2] ^= 1
    for weights in (whole_weights, whole_weights[:-8], b""):
        (tmp_path / "model.bin").write_bytes(weights)
        with pytest.raises(EdgekitError, match=r"model\.(bin|xml): "):
            FORMATS["openvino"].open(tmp_path / "model.xml")
    (tmp_path / "model.bin").unlink()
    with pytest.raises(EdgekitError, match=r"model\.bin: there is no such file"):
        judge.open(tmp_path / "model.xml", isolated=False)


@needs_openvino
def test_images_of_another_size_and_an_onnx_file_under_its_name_are_refused(whole: Any, tmp_path: Path):
    run, _ = whole
    opened = FORMATS["openvino"].open(run.artifacts / "openvino-fp32/model.xml", threads=1)
    with pytest.raises(EdgekitError, match="takes images of the shape"):
        opened(torch.zeros(2, 1, 9, 9))
    shutil.copy(run.artifacts / "openvino-int8/twin.onnx", tmp_path / "model.xml")
    (tmp_path / "model.bin").touch()
    with pytest.raises(EdgekitError, match="not an OpenVINO file"):
        FORMATS["openvino"].open(tmp_path / "model.xml")


@needs_openvino
def test_floats_are_multiplied_as_floats(whole: Any):
    """Where a processor has bfloat16 products OpenVINO would take them by itself: three digits, not seven."""
    run, _ = whole
    student = models.load(run.student, factory=read(run.recipe_file).student.architecture)
    images = data.load(read(run.recipe_file).data).test.floats()[:50]
    answered = FORMATS["openvino"].open(run.artifacts / "openvino-fp32/model.xml")(images)
    expected = predict(student, images)
    assert numpy.abs(answered.numpy() - expected.numpy()).max() < 1e-5 * max(1.0, float(expected.abs().max()))


@needs_openvino
def test_an_int8_file_that_is_not_its_graph_is_refused(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copytree(place, tmp_path / "work", symlinks=True)
    monkeypatch.chdir(tmp_path / "work")
    opened = FORMATS["openvino"].open

    def other(path: Path, **options: Any) -> Any:
        file = opened(path, **options)
        wrong = (path.parent / "twin.onnx").is_file()
        return Wrapped(lambda images: file(images).roll(1, 1) if wrong else file(images), differentiable=False)

    monkeypatch.setattr(FORMATS["openvino"], "open", other)
    with pytest.raises(EdgekitError, match=r"openvino-int8: decides as the graph that it was made of on \d+\.\d % of"):
        export(int8=True, formats="openvino", ptq="plain")
    assert not Path("runs/small-1/artifacts/openvino-int8").exists()


@needs_openvino
def test_bench_and_inspect_know_it(whole: Any):
    run, _ = whole
    folder = run.artifacts / "openvino-int8"
    about = inspect(folder / "model.xml")
    assert about["kind"] == "openvino" and about["operators"]["int8"]["Convolution"] == 2
    assert about["made_from"]["student_sha256"] == run.info()["student_sha256"]
    measured = bench(folder, batch=2, threads=1, rounds=3)["artifacts"][0]
    assert measured["operators"]["int8"] >= 3 and measured["bytes"] == artifact.load(folder).bytes


@needs_openvino
def test_a_search_is_one_of_onnx_files(place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(place)
    with pytest.raises(EdgekitError, match=r"--robust-drop: its tries are measured as ONNX files"):
        export(int8=True, formats="openvino", robust_drop=0.01)
