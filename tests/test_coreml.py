"""Core ML as far as a machine that is no Mac goes: what stands in the package, computed by another reader of it."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy
import onnx
import pytest
import torch
from damaged import described
from milprogram import computed
from networks import network, photos
from onnx import numpy_helper
from unrun import LACKED, exported

import edgekit
from edgekit import artifact, data, judge, models, quantize, runs
from edgekit.classifier import predict
from edgekit.errors import EdgekitError
from edgekit.files import sha256
from edgekit.formats import coreml
from edgekit.formats import onnx as onnx_format
from edgekit.inspector import inspect
from edgekit.recipe import read
from edgekit.verifier import verify

PRECISIONS = ("fp32", "fp16", "int8")
METADATA = {
    "classes": json.dumps(["ä\n", '"b"'] + ["c"] * 8),
    "input": '{"shape": [null, 3, 16, 16]}',
    "outputs": "logits",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[runs.Run, dict[str, Any]]]:
    pytest.importorskip("coremltools")
    with exported(tmp_path_factory.mktemp("packages"), "coreml", coreml) as made:
        yield made


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Path], onnx.ModelProto]:
    """A MobileNetV2, its packages by precision, and its QDQ graph."""
    pytest.importorskip("coremltools")
    student, folders = network(), {name: tmp_path_factory.mktemp(name) for name in PRECISIONS}
    lowered = onnx_format.lower(student)
    made = quantize.quantize(lowered, photos(16), quantize.SCHEMES["symmetric"]).model
    for name, folder in folders.items():
        coreml.write_model(made if name == "int8" else lowered, folder, METADATA, name)
    return student, folders, made


def logits(path: Path, images: torch.Tensor) -> torch.Tensor:
    package = coreml.read(path)
    return torch.cat([computed(package, image[None]) for image in images])


def test_float_packages_compute_what_the_network_does(written: Any):
    student, folders, _ = written
    images = photos(4)
    expected = predict(student, images)
    spread = (expected.max() - expected.min()).item()
    single = logits(folders["fp32"] / coreml.FILE, images)
    assert single.dtype == torch.float32 and torch.allclose(single, expected, atol=1e-4)
    half = logits(folders["fp16"] / coreml.FILE, images)
    assert half.dtype == torch.float32 and 0 < (half - expected).abs().max() < 0.02 * spread


def test_an_int8_package_computes_what_the_graph_beside_it_does(written: Any):
    _, folders, _ = written
    images = photos(4)
    # ONNX Runtime without its optimizer computes each node by itself, as the package says it.
    graph = onnx_format.open(folders["int8"] / "twin.onnx", threads=1, optimization="none")
    expected, answered = graph(images), logits(folders["int8"] / coreml.FILE, images)
    spread = (expected.max() - expected.min()).item()
    assert (answered - expected).abs().max() < 0.1 * spread  # floats between integers are float16 here
    assert answered.argmax(1).equal(expected.argmax(1))


def test_integers_and_scales_are_those_of_the_graph(written: Any):
    _, folders, made = written
    graph = onnx.load(folders["int8"] / "twin.onnx")
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    before = {tensor.name: numpy_helper.to_array(tensor) for tensor in made.graph.initializer}
    program = {one.output: one for one in coreml.read(folders["int8"] / coreml.FILE).operations}
    weights = 0
    for node in graph.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        one, scale = program[coreml._plain(node.output[0])], arrays[node.input[1]]
        assert numpy.array_equal(one.inputs["scale"], scale) and scale.dtype == numpy.float32
        assert (numpy.abs(scale / before[node.input[1]] - 1) <= 2**-11).all()
        if node.input[0] in arrays:
            weights += 1
            assert one.kind == "constexpr_affine_dequantize"
            assert one.inputs["quantized_data"].dtype == numpy.int8
            assert numpy.array_equal(one.inputs["quantized_data"], before[node.input[0]])
    assert weights == 53  # 52 convolutions and a dense layer


def test_the_package_describes_itself(written: Any):
    _, folders, _ = written
    for name, folder in folders.items():
        about = coreml.describe(folder / coreml.FILE)
        assert about["metadata"] == METADATA
        assert about["input"] == {"name": "images", "shape": [1, 3, 16, 16]}
        assert coreml.read(folder / coreml.FILE).output == ("logits", [1, 10])
        convolutions = about["operators"]["int8" if name == "int8" else "float"]["conv"]
        assert convolutions == 52
        assert about["bytes"] == sum((folder / file).stat().st_size for file in (coreml.FILE, coreml.WEIGHTS))
    size = {name: (folder / coreml.WEIGHTS).stat().st_size for name, folder in folders.items()}
    assert size["fp16"] < 0.55 * size["fp32"] and size["int8"] < 0.3 * size["fp32"]


def test_coremltools_reads_the_package_as_a_program_for_ios_17(written: Any):
    import coremltools

    package = coreml.root(written[1]["int8"] / coreml.FILE)
    before = (package / "Manifest.json").read_bytes()
    spec = coremltools.utils.load_spec(str(package))
    assert (package / "Manifest.json").read_bytes() == before  # it is written again by whoever opens it
    assert spec.specificationVersion == 8 and spec.WhichOneof("Type") == "mlProgram"
    (image,), (answer,) = spec.description.input, spec.description.output
    assert image.type.multiArrayType.dataType == answer.type.multiArrayType.dataType
    assert not [key for key in spec.description.metadata.userDefined if "coremltools" in key]
    manifest = json.loads(before)
    root = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]
    assert root["path"] == "com.apple.CoreML/model.mlmodel"


def test_two_exports_are_the_same_bytes(written: Any, tmp_path: Path):
    _, folders, made = written
    coreml.write_model(made, tmp_path, METADATA, "int8")
    for path in (path for path in folders["int8"].rglob("*") if path.is_file()):
        assert (tmp_path / path.relative_to(folders["int8"])).read_bytes() == path.read_bytes(), path.name


def test_resnets_are_written_too(tmp_path: Path):
    pytest.importorskip("coremltools")
    student = network("resnet18", width=0.125)
    coreml.write(student, tmp_path, {})
    images = photos(2)
    assert torch.allclose(logits(tmp_path / coreml.FILE, images), predict(student, images), atol=1e-4)


def test_an_operator_that_is_not_written_is_named(tmp_path: Path):
    pytest.importorskip("coremltools")
    value = onnx.helper.make_tensor_value_info
    ports = [value(name, onnx.TensorProto.FLOAT, [1, 3, 4, 4]) for name in ("images", "logits")]
    body = onnx.helper.make_graph([onnx.helper.make_node("Erf", ["images"], ["logits"])], "g", ports[:1], ports[1:])
    with pytest.raises(EdgekitError, match="Erf is not written for Core ML by this version"):
        coreml.write_model(onnx.helper.make_model(body), tmp_path, {})


@pytest.mark.parametrize("damage", ["truncated", "empty", "other", "weights", "no weights"])
def test_a_damaged_package_is_one_sentence(written: Any, tmp_path: Path, damage: str):
    shutil.copytree(coreml.root(written[1]["fp32"] / coreml.FILE), tmp_path / "model.mlpackage")
    path, weights = tmp_path / coreml.FILE, tmp_path / coreml.WEIGHTS
    whole = path.read_bytes()
    if damage == "weights":
        flipped = bytearray(weights.read_bytes())
        flipped[len(flipped) // 2] ^= 1
        weights.write_bytes(flipped)
    elif damage == "no weights":
        weights.unlink()
    else:
        path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "other": b"\x00PNG" * 99}[damage])
    for what in (coreml.open, coreml.describe, inspect):
        with pytest.raises(EdgekitError, match=r"model\.mlmodel|weight\.bin") as caught:
            what(path)
        assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


def test_packages_are_written_file_by_file_and_not_compared(whole: tuple[runs.Run, dict[str, Any]]):
    run, document = whole
    schema = json.loads((Path(edgekit.__file__).parent / "schemas/artifact.json").read_text())
    assert [one["name"] for one in document["artifacts"]] == ["coreml-fp32", "coreml-int8", "coreml-fp16"]
    inside = ["Data/com.apple.CoreML/model.mlmodel", "Data/com.apple.CoreML/weights/weight.bin", "Manifest.json"]
    for one in document["artifacts"]:
        written = artifact.load(run.artifacts / one["name"])
        jsonschema.validate(written.record, schema)
        assert LACKED in written.record["not_compared"] and "against_float" not in written.record
        beside = ["twin.onnx"] if written.precision == "int8" else []
        listed = [file["path"] for file in written.record["files"]]
        assert listed == [*(f"model.mlpackage/{file}" for file in inside), *beside]
        assert written.sha256 == sha256(written.path) and written.path.name == "model.mlmodel"
        metadata = coreml.read(written.path).metadata
        assert json.loads(metadata["classes"]) == written.record["classes"]
        assert json.loads(metadata["input"]) == written.record["input"]
        assert metadata["student_sha256"] == run.info()["student_sha256"]


def test_the_package_of_a_run_decides_as_its_student(whole: tuple[runs.Run, dict[str, Any]]):
    run, _ = whole
    student = models.load(run.student, factory=read(run.recipe_file).student.architecture)
    images = data.load(read(run.recipe_file).data).test.floats()[:100]
    expected = predict(student, images).argmax(1)
    for precision, agreement in (("fp32", 1), ("fp16", 0.99), ("int8", 0.95)):
        answered = logits(run.artifacts / f"coreml-{precision}" / coreml.FILE, images).argmax(1)
        assert (answered == expected).double().mean() >= agreement


def test_files_of_a_package_that_changed_or_lead_elsewhere_are_refused(
    whole: tuple[runs.Run, dict[str, Any]], tmp_path: Path
):
    folder = tmp_path / "coreml-fp32"
    shutil.copytree(whole[0].artifacts / "coreml-fp32", folder)
    weights = folder / coreml.WEIGHTS
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(EdgekitError, match=r"weight\.bin: the file has changed since it was exported"):
        artifact.load(folder)
    weights.write_bytes(kept)
    record = json.loads((folder / "artifact.json").read_text())
    for path in ("../coreml-fp32/artifact.json", "/etc/hostname", "model.mlpackage/../../x"):
        changed = {**record, "files": [{**record["files"][0], "path": path}, *record["files"]]}
        (folder / "artifact.json").write_text(json.dumps(changed))
        with pytest.raises(EdgekitError, match=r"not a valid artifact\.json"):
            artifact.load(folder)
        schema = json.loads((Path(edgekit.__file__).parent / "schemas/artifact.json").read_text())
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(changed, schema)


def test_inspect_takes_the_package_as_it_lies(whole: tuple[runs.Run, dict[str, Any]]):
    run, _ = whole
    about = inspect(run.artifacts / "coreml-int8/model.mlpackage")
    assert about["kind"] == "coreml" and about["operators"]["int8"]["conv"] == 2
    assert LACKED in about["not_compared"] and about["scheme"]["activations"]["symmetric"]


def test_it_is_judged_where_it_runs(whole: tuple[runs.Run, dict[str, Any]]):
    run, _ = whole
    written = artifact.load(run.artifacts / "coreml-fp32")
    for what in (lambda: coreml.open(written.path), lambda: judge.open(written)):
        with pytest.raises(EdgekitError, match=LACKED) as caught:
            what()
        assert caught.value.exit_code == 4
    with pytest.raises(EdgekitError, match=r"judge\.serve model\.mlpackage/Data/.*/model\.mlmodel; then"):
        judge.open(written)
    # The folder that the package is in stands for it, also by the package's own name.
    for what in (written.folder, written.folder / "model.mlpackage"):
        with pytest.raises(EdgekitError, match=rf"nothing could run here .*{LACKED}.*--judge") as caught:
            verify(what, attack="pgd5", samples=20)
        assert caught.value.exit_code == 4


def test_on_a_mac_each_image_is_asked_for_by_itself(written: Any, monkeypatch: pytest.MonkeyPatch):
    student, folders, _ = written
    asked: list[str] = []

    class MLModel:
        def __init__(self, path: str) -> None:
            asked.append(path)

        def predict(self, given: dict[str, numpy.ndarray]) -> dict[str, numpy.ndarray]:
            assert given["images"].shape == (1, 3, 16, 16) and given["images"].dtype == numpy.float32
            return {"logits": predict(student, torch.from_numpy(given["images"])).numpy()}

    library = SimpleNamespace(models=SimpleNamespace(MLModel=MLModel))
    path = folders["fp32"] / coreml.FILE
    package = coreml.read(path)
    monkeypatch.setattr(coreml, "read", lambda _: package)
    monkeypatch.setattr(coreml, "package", lambda: library)
    monkeypatch.setattr(coreml, "lacking", lambda: None)
    opened, images = coreml.open(path), photos(3)
    assert asked == [str(folders["fp32"] / "model.mlpackage")]
    assert torch.allclose(opened(images), predict(student, images), atol=1e-5)
    assert opened(images[:0]).shape == (0, 10)
    with pytest.raises(EdgekitError, match=r"takes images of the shape \[3, 16, 16\]"):
        opened(torch.zeros(1, 3, 8, 8))


def test_it_needs_a_mac():
    assert (coreml.lacking() is None) == (sys.platform == "darwin")


def test_describing_a_file_with_changed_bytes_is_one_sentence_or_an_answer(written: Any, tmp_path: Path):
    assert described("coreml", written[1]["fp32"] / coreml.FILE, tmp_path, 150) < 150
