"""TensorRT as far as a machine without a GPU goes: what is built, what is refused, and the calls that run an engine."""

import ctypes
import json
import shlex
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
from networks import network, photos
from onnx import numpy_helper
from unrun import LACKED, exported

import edgekit
from edgekit import artifact, data, judge, quantize, runs
from edgekit.classifier import predict
from edgekit.errors import EdgekitError
from edgekit.formats import half, tensorrt
from edgekit.formats import onnx as onnx_format
from edgekit.inspector import inspect
from edgekit.recipe import read
from edgekit.verifier import verify


@pytest.fixture(scope="module")
def trt() -> Any:
    return pytest.importorskip(tensorrt._MODULE)


@pytest.fixture(scope="module")
def whole(trt: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[runs.Run, dict[str, Any]]]:
    with exported(tmp_path_factory.mktemp("engines"), "tensorrt", tensorrt) as made:
        yield made


@pytest.fixture(scope="module")
def graphs() -> tuple[Any, onnx.ModelProto, onnx.ModelProto]:
    """A MobileNetV2, its fp32 graph and its int8 one."""
    student = network()
    lowered = onnx_format.lower(student)
    made = quantize.quantize(lowered, photos(16), quantize.SCHEMES["symmetric"]).model
    return student, lowered, made


def answers(model: onnx.ModelProto, folder: Path, images: torch.Tensor) -> torch.Tensor:
    onnx.save(model, folder / "graph.onnx")
    return onnx_format.open(folder / "graph.onnx", threads=1, optimization="none")(images)


def test_engines_are_written_and_it_is_said_that_they_did_not_run(whole: tuple[runs.Run, dict[str, Any]]):
    run, document = whole
    schema = json.loads((Path(edgekit.__file__).parent / "schemas/artifact.json").read_text())
    assert [one["name"] for one in document["artifacts"]] == ["tensorrt-fp32", "tensorrt-int8", "tensorrt-fp16"]
    assert "latency" not in document
    for one in document["artifacts"]:
        written = artifact.load(run.artifacts / one["name"])
        jsonschema.validate(written.record, schema)
        assert "against_float" not in written.record and "operators" not in written.record
        assert LACKED in written.record["not_compared"]
        assert {"tensorrt_rtx", "tensorrt"} & set(written.record["versions"])
        beside = ["twin.onnx"] if written.precision == "int8" else []
        assert [file["path"] for file in written.record["files"]] == ["model.engine", *beside]
        assert written.path.read_bytes()[:4] in tensorrt._ENGINES


def test_an_artifact_says_one_of_compared_and_why_not(whole: tuple[runs.Run, dict[str, Any]]):
    schema = json.loads((Path(edgekit.__file__).parent / "schemas/artifact.json").read_text())
    record = artifact.load(whole[0].artifacts / "tensorrt-fp32").record
    silent = {key: value for key, value in record.items() if key != "not_compared"}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(silent, schema)


def test_biases_become_the_floats_that_they_stood_for(graphs: Any, trt: Any, tmp_path: Path):
    _, _, made = graphs
    floats, images = tensorrt.float_biases(made), photos(8)
    assert torch.equal(answers(floats, tmp_path, images), answers(made, tmp_path, images))
    kinds = {tensor.data_type for tensor in floats.graph.initializer}
    assert onnx.TensorProto.INT32 not in kinds and onnx.TensorProto.INT8 in kinds
    # Once TensorRT takes int32 behind a DequantizeLinear, the floats can go.
    with pytest.raises(EdgekitError, match="Int32"):
        tensorrt._built(trt, made)


def test_the_network_that_is_built_is_strongly_typed_and_has_every_quantization(graphs: Any, trt: Any):
    made = tensorrt.float_biases(graphs[2])
    seen: list[Any] = []

    class Builder(trt.Builder):
        def build_serialized_network(self, network: Any, config: Any) -> Any:
            seen.append((network, config, [network.get_layer(place) for place in range(network.num_layers)]))
            return b"engine"

    assert tensorrt._built(SimpleNamespace(**{**vars(trt), "Builder": Builder}), made) == b"engine"
    ((built, config, layers),) = seen
    assert built.get_flag(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert not config.get_flag(trt.BuilderFlag.TF32)
    for kind, operator in ((trt.LayerType.QUANTIZE, "QuantizeLinear"), (trt.LayerType.DEQUANTIZE, "DequantizeLinear")):
        count = sum(node.op_type == operator for node in made.graph.node)
        assert count and sum(layer.type == kind for layer in layers) == count
    assert all(layer.get_output(0).dtype == trt.int8 for layer in layers if layer.type == trt.LayerType.QUANTIZE)
    image, logits = built.get_input(0), built.get_output(0)
    assert (image.name, tuple(image.shape), image.dtype) == ("images", (-1, 3, 16, 16), trt.float32)
    assert (logits.name, tuple(logits.shape), logits.dtype) == ("logits", (-1, 10), trt.float32)
    assert config.num_optimization_profiles == 1


def test_half_is_float16_from_the_first_layer_to_the_logits(graphs: Any, tmp_path: Path):
    student, lowered, made = graphs
    halved, images = half.halved(lowered), photos(8)
    onnx.checker.check_model(halved, full_check=True)
    weights = [numpy_helper.to_array(tensor) for tensor in halved.graph.initializer if len(tensor.dims) == 4]
    assert sum(weight.dtype == numpy.float16 for weight in weights) == 52
    assert [weight.shape for weight in weights if weight.dtype == numpy.float32] == [(1, 3, 1, 1)] * 2  # mean and std
    answered = answers(halved, tmp_path, images)
    expected = predict(student, images)
    assert 0 < (answered - expected).abs().max() < 0.01 * (expected.max() - expected.min())
    # In a QDQ graph the image is quantized from float32: the first integers are the same.
    onnx.checker.check_model(half.halved(tensorrt.float_biases(made)), full_check=True)
    first = half.halved(tensorrt.float_biases(made)).graph.node[:3]
    assert [node.op_type for node in first] == ["Sub", "Div", "QuantizeLinear"]


def test_a_weight_beyond_float16_is_refused(graphs: Any):
    large = onnx.ModelProto()
    large.CopyFrom(graphs[1])
    tensor = next(tensor for tensor in large.graph.initializer if len(tensor.dims) == 4 and tensor.dims[0] > 1)
    tensor.CopyFrom(numpy_helper.from_array(1e5 * numpy.ones(tuple(tensor.dims), numpy.float32), tensor.name))
    with pytest.raises(EdgekitError, match="larger than float16 can hold"):
        half.halved(large)


class Engine:
    """What `ICudaEngine` and its context are asked, answered by a network on the CPU through the same addresses."""

    def __init__(self, trt: Any, network: Any, *, most: int = 64, dtype: Any = None, outputs: int = 1) -> None:
        self.trt, self.network, self.most, self.dtype = trt, network, most, dtype or trt.float32
        self.names = ["images", *(f"logits{place}" for place in range(outputs))]
        self.num_io_tensors, self.batches = len(self.names), list[int]()
        self.places: dict[str, int] = {}
        self.fails = False

    def get_tensor_name(self, place: int) -> str:
        return self.names[place]

    def get_tensor_mode(self, name: str) -> Any:
        return self.trt.TensorIOMode.INPUT if name == "images" else self.trt.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return self.dtype

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, 3, 16, 16) if name == "images" else (-1, 10)

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        assert (name, profile) == ("images", 0)
        return [(1, 3, 16, 16), (8, 3, 16, 16), (self.most, 3, 16, 16)]

    def create_execution_context(self) -> "Engine":
        return self

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert name == "images"
        self.shape = shape
        return 1 <= shape[0] <= self.most

    def set_tensor_address(self, name: str, place: int) -> bool:
        self.places[name] = place
        return place % 64 == 0

    def execute_async_v3(self, stream: int) -> bool:
        self.batches.append(self.shape[0])
        size = int(numpy.prod(self.shape))
        given = numpy.ctypeslib.as_array((ctypes.c_float * size).from_address(self.places["images"]))
        with torch.no_grad():
            answer = self.network(torch.from_numpy(given.copy()).view(self.shape)).contiguous()
        ctypes.memmove(self.places["logits0"], answer.data_ptr(), answer.nbytes)
        return not self.fails


def test_an_engine_is_asked_in_batches_of_its_profile(trt: Any, graphs: Any):
    student = graphs[0]
    engine = Engine(trt, student, most=8)
    opened = tensorrt.classifier(trt, engine, torch.device("cpu"), Path("model.engine"))
    assert not opened.differentiable
    images = photos(21)
    expected = student(images).detach()
    assert torch.allclose(opened(images), expected, atol=1e-5)
    assert engine.batches == [8, 8, 5]
    assert opened(images[:0]).shape == (0, 10)
    # An image that lies anywhere in memory, and one in another layout or type.
    assert torch.allclose(opened(images[1:2]), expected[1:2], atol=1e-5)
    assert torch.allclose(opened(images.double().to(memory_format=torch.channels_last)), expected, atol=1e-5)
    with pytest.raises(EdgekitError, match=r"takes images of the shape \[3, 16, 16\], not \[3, 9, 9\]"):
        opened(torch.zeros(2, 3, 9, 9))
    engine.fails = True
    with pytest.raises(EdgekitError, match="does not compute these images"):
        opened(images)


def test_an_engine_that_is_no_classifier_is_refused(trt: Any, graphs: Any):
    for wrong, said in (({"dtype": trt.int8}, "not float32"), ({"outputs": 2}, "1 inputs and 2 outputs")):
        with pytest.raises(EdgekitError, match=said):
            tensorrt.classifier(trt, Engine(trt, graphs[0], **wrong), torch.device("cpu"), Path("model.engine"))


def test_without_a_gpu_an_engine_is_refused_with_what_to_do(whole: tuple[runs.Run, dict[str, Any]]):
    written = artifact.load(whole[0].artifacts / "tensorrt-fp32")
    for what in (lambda: tensorrt.open(written.path), lambda: judge.open(written), lambda: verify(written.folder)):
        with pytest.raises(EdgekitError, match=LACKED) as caught:
            what()
        assert caught.value.exit_code == 4
    with pytest.raises(EdgekitError, match=r"judge\.serve model\.engine --trust-file; then say here: --judge"):
        judge.open(written)


def test_an_engine_of_unknown_origin_is_code(whole: tuple[runs.Run, dict[str, Any]], tmp_path: Path):
    shutil.copy(whole[0].artifacts / "tensorrt-fp32/model.engine", tmp_path)
    with pytest.raises(EdgekitError, match=r"can run code of the file. Trust it: --trust-file") as caught:
        judge.open(tmp_path / "model.engine")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("damage", ["truncated", "longer", "empty", "other"])
def test_a_damaged_engine_is_one_sentence(whole: tuple[runs.Run, dict[str, Any]], tmp_path: Path, damage: str):
    data = (whole[0].artifacts / "tensorrt-fp32/model.engine").read_bytes()
    made = {"truncated": data[: len(data) // 2], "longer": data + b"\0", "empty": b"", "other": b"\x08\x0a" * 999}
    path = tmp_path / "model.engine"
    path.write_bytes(made[damage])
    if damage in ("truncated", "longer") and not data.startswith(tensorrt._SIZED):
        pytest.skip("only TensorRT-RTX is known to say the size of an engine")
    for what in (tensorrt.open, tensorrt.describe, inspect):
        with pytest.raises(EdgekitError, match=r"model\.engine: ") as caught:
            what(path)
        assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


def test_inspect_says_what_an_engine_holds_and_what_it_does_not(whole: tuple[runs.Run, dict[str, Any]], trt: Any):
    run, _ = whole
    about = inspect(run.artifacts / "tensorrt-int8/model.engine")
    assert about["kind"] == "tensorrt" and about["built by"].endswith(trt.__version__)
    assert about["operators"]["int8"]["Conv"] == 2 and "Conv" not in about["operators"]["float"]
    assert "holds no metadata" in about["note"] and about["metadata"] == {}
    assert about["made_from"]["student_sha256"] == run.info()["student_sha256"]
    assert LACKED in about["not_compared"]
    graph = onnx.load(run.artifacts / "tensorrt-int8/twin.onnx")
    assert json.loads({entry.key: entry.value for entry in graph.metadata_props}["classes"])


def test_what_did_not_run_never_passes_silently(whole: tuple[runs.Run, dict[str, Any]]):
    document = verify("runs/small-1", attack="pgd5", samples=20, tolerance=1, clean_tolerance=1)
    found = {one["name"]: one for one in document["artifacts"]}
    assert found["onnx-fp32"]["verdict"] != "not_run"
    for precision in ("fp32", "int8", "fp16"):
        one = found[f"tensorrt-{precision}"]
        assert one["verdict"] == "not_run" and LACKED in one["why"]
        assert one["command"].endswith(f"runs/small-1/artifacts/tensorrt-{precision} --judge tcp://HOST:PORT")
    assert not document["passed"]
    skipped = verify("runs/small-1", attack="pgd5", samples=20, tolerance=1, clean_tolerance=1, skip_unavailable=True)
    assert skipped["passed"] == (found["onnx-fp32"]["verdict"] == "survived")


def test_the_device_judges_it_and_the_graph_gives_gradients(whole: tuple[runs.Run, dict[str, Any]]):
    run, _ = whole
    folder = run.artifacts / "tensorrt-int8"
    device = shlex.join([sys.executable, "-m", "edgekit.judge.child", str(folder / "twin.onnx")])
    document = verify(folder, attack="pgd5", samples=20, judge=device)
    (one,) = document["artifacts"]
    assert one["verdict"] != "not_run" and one["judged_on"].startswith("judge ")
    assert {"float", "twin"} <= set(one["attacks"][0]["sources"])
    assert one["twin"]["agreement"] >= 0.9


def test_the_graph_beside_it_answers_about_as_the_student(whole: tuple[runs.Run, dict[str, Any]]):
    run, _ = whole
    from edgekit import models

    student = models.load(run.student, factory=read(run.recipe_file).student.architecture)
    images = data.load(read(run.recipe_file).data).test.floats()
    expected = predict(student, images).argmax(1)
    answered = onnx_format.open(run.artifacts / "tensorrt-int8/twin.onnx", threads=1)(images).argmax(1)
    assert (answered == expected).double().mean() > 0.95


def test_bench_measures_what_runs_here_and_names_the_rest(whole: tuple[runs.Run, dict[str, Any]], capsys):
    run, _ = whole
    document = edgekit.bench(run.folder, rounds=1, threads=1, batch=1)
    assert [one["name"] for one in document["artifacts"]] == ["onnx-fp32"]
    assert f"tensorrt-int8 is not measured: it needs {LACKED}" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(EdgekitError, match="nothing here can be measured on this machine: tensorrt-int8") as caught:
        edgekit.bench(run.artifacts / "tensorrt-int8", rounds=1)
    assert caught.value.exit_code == 4


def test_without_its_graph_an_engine_says_nothing_of_its_operators(tmp_path: Path):
    assert tensorrt.running(tmp_path / tensorrt.FILE) == {"int8": 0, "float": {}}
