"""LiteRT: a small network in every precision, its integers against those of the QDQ graph, and damaged files."""

import json
import shutil
from pathlib import Path

import numpy
import onnx
import onnxruntime
import pytest
import torch
from damaged import described
from networks import photos
from onnx import numpy_helper
from test_exporter import make
from torch import Tensor, nn

from edgekit import artifact, data, judge, models, quantize, runs
from edgekit.classifier import predict
from edgekit.errors import EdgekitError
from edgekit.exporter import export
from edgekit.formats import flatbuffer, litert
from edgekit.formats import onnx as onnx_format
from edgekit.inspector import inspect
from edgekit.models import Network
from edgekit.quantize import Settings
from edgekit.recipe import Student, read
from edgekit.verifier import verify

pytest.importorskip("litert_torch")
pytest.importorskip("ai_edge_litert")

METADATA = {"classes": json.dumps(["ä\n", '"b"', "c", "d"]), "outputs": "logits"}


class Residual(nn.Module):
    """One layer of each kind: dense, depthwise with stride, pointwise, a sum, an average, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.deep = nn.Sequential(nn.Conv2d(16, 16, 3, 2, 1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.point = nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.classify = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.deep(self.stem(x))
        return self.classify((x + self.point(x)).mean((2, 3)))


def network() -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        body = Residual()
        made = Network(body, Student(architecture="mobilenetv2"), tuple("abcd"), (3, 8, 8), (0.5,) * 3, (0.25,) * 3)
        for _ in range(4):
            made(photos(64, 8))
        nn.init.normal_(body.classify.weight)
    return made.eval()


@pytest.fixture(scope="module")
def student() -> Network:
    return network()


@pytest.fixture(scope="module")
def float_file(tmp_path_factory: pytest.TempPathFactory, student: Network) -> Path:
    folder = tmp_path_factory.mktemp("float")
    litert.write(student, folder, METADATA)
    return folder / "model.tflite"


def quantized(student: Network, settings: Settings = Settings()) -> onnx.ModelProto:
    return quantize.quantize(onnx_format.lower(student), photos(64, 8), quantize.SCHEMES["signed"], settings).model


@pytest.fixture(scope="module")
def int8_file(tmp_path_factory: pytest.TempPathFactory, student: Network) -> Path:
    folder = tmp_path_factory.mktemp("int8")
    litert.write_model(quantized(student), folder, METADATA, "int8")
    return folder / "model.tflite"


def answers(path: Path, images: Tensor) -> numpy.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return numpy.asarray(session.run(None, {"images": images.numpy()})[0])


def test_any_number_of_images_gets_the_networks_answers(float_file: Path, student: Network):
    images = photos(7, 8, seed=1)
    expected = student(images).detach()
    opened = litert.open(float_file, threads=1)
    assert not opened.differentiable
    for count in (7, 0, 1, 3):
        answered = opened(images[:count])
        assert answered.shape == (count, 4) and answered.dtype == torch.float32
        assert answered.allclose(expected[:count], atol=1e-5)
    with pytest.raises(EdgekitError, match=r"model\.tflite: takes images of the shape \['batch', 3, 8, 8\]"):
        opened(torch.zeros(2, 1, 9, 9))


def test_the_file_describes_itself_and_nothing_else(float_file: Path):
    about = litert.describe(float_file)
    assert about["metadata"] == METADATA and about["bytes"] == float_file.stat().st_size
    assert about["input"] == {"name": "images", "shape": ["batch", 3, 8, 8]}
    kinds = about["operators"]["float"]
    assert kinds["CONV_2D"] == 2 and kinds["DEPTHWISE_CONV_2D"] == 1 and set(about["operators"]) == {"float"}
    names = [tensor.name for tensor in flatbuffer.read(float_file.read_bytes()).subgraphs[0].tensors]
    assert not any(b"edgekit" in name or b"stem" in name for name in names)


def test_a_file_for_one_image_is_asked_image_by_image(float_file: Path, student: Network, tmp_path: Path):
    model = flatbuffer.read(float_file.read_bytes())
    for tensor in model.subgraphs[0].tensors:
        tensor.shapeSignature = None
    (tmp_path / "one.tflite").write_bytes(flatbuffer.written(model))
    assert litert.describe(tmp_path / "one.tflite")["input"]["shape"] == [1, 3, 8, 8]
    images = photos(5, 8, seed=1)
    assert litert.open(tmp_path / "one.tflite", threads=1)(images).allclose(student(images), atol=1e-5)


def test_data_are_aligned_as_the_schema_asks(int8_file: Path):
    content = int8_file.read_bytes()
    model = flatbuffer.read(content)
    weights = [buffer.data for buffer in model.buffers if buffer.data is not None and len(buffer.data) > 100]
    places = [content.index(data.tobytes()) for data in weights]
    assert len(places) > 2 and not any(place % 16 for place in places)


def test_half_precision_holds_the_weights_and_answers_nearly_alike(float_file: Path, student: Network, tmp_path: Path):
    model = flatbuffer.read(float_file.read_bytes())
    flatbuffer.halve(model)
    (tmp_path / "half.tflite").write_bytes(flatbuffer.written(model))
    images = photos(50, 8, seed=1)
    answered = litert.open(tmp_path / "half.tflite", threads=1)(images)
    difference = (answered - student(images)).abs().max()
    assert 0 < difference < 0.01
    linear = student.body.classify.weight.detach().numpy().astype(numpy.float16)  # pyright: ignore
    assert linear.tobytes() in [bytes(buffer.data) for buffer in model.buffers if buffer.data is not None]
    model = flatbuffer.read(float_file.read_bytes())
    place = next(place for place, each in enumerate(model.buffers) if each.data is not None and len(each.data) == 256)
    model.buffers[place].data = numpy.full(64, 1e6, numpy.float32).view(numpy.uint8)
    with pytest.raises(EdgekitError, match="weights that float16 cannot hold"):
        flatbuffer.halve(model)


def test_the_int8_file_holds_the_graphs_own_integers_and_grids(int8_file: Path):
    model = flatbuffer.read(int8_file.read_bytes())
    (graph,) = model.subgraphs
    constants = {
        each.name: numpy_helper.to_array(each) for each in onnx.load(int8_file.with_name("twin.onnx")).graph.initializer
    }

    def stored(kind: str, element: type) -> list[tuple[list[int], list[float]]]:
        found = []
        for place, tensor in enumerate(graph.tensors):
            grid, known = tensor.quantization.scale, flatbuffer.constant(model, graph, place)
            if flatbuffer.element(graph, place) == kind and grid is not None and known:
                values = model.buffers[tensor.buffer].data.view(element)
                found.append((sorted(values.tolist()), grid.tolist()))
        return sorted(found)

    def expected(kind: type, names: list[str]) -> list[tuple[list[int], list[float]]]:
        return sorted((sorted(constants[name].ravel().tolist()), constants[scale(name)].tolist()) for name in names)

    def scale(name: str) -> str:
        return name.removesuffix("_quantized") + "_scale"

    # The linear layer's result is floats, so its weights and its bias stay floats too.
    whole = [name for name, value in constants.items() if name.endswith("_quantized") and "classify" not in name]
    weights = [name for name in whole if constants[name].dtype == numpy.int8]
    biases = [name for name in whole if constants[name].dtype == numpy.int32 and len(constants[name]) == 16]
    assert len(weights) == len(biases) == 3
    assert stored("INT8", numpy.int8) == expected(numpy.int8, weights)
    assert stored("INT32", numpy.int32) == expected(numpy.int32, biases)
    # Order of channels: the depthwise layer lies (1, H, W, C) there and (C, 1, H, W) here.
    node = next(node for node in graph.operators if flatbuffer.kind(model, node) == "DEPTHWISE_CONV_2D")
    tensor = graph.tensors[node.inputs[1]]
    laid = model.buffers[tensor.buffer].data.view(numpy.int8).reshape(tensor.shape)
    (deep,) = (name for name in weights if constants[name].shape == (16, 1, 3, 3))
    assert numpy.array_equal(laid.transpose(3, 0, 1, 2), constants[deep])
    # Activations: every grid is one of the graph's, to the last bit.
    grids = {
        (float(value), int(constants[name.removesuffix("_scale") + "_zero_point"]))
        for name, value in constants.items()
        if name.endswith("_scale") and not value.ndim
    }
    used = {
        (float(tensor.quantization.scale[0]), int(tensor.quantization.zeroPoint[0]))
        for place, tensor in enumerate(graph.tensors)
        if flatbuffer.element(graph, place) == "INT8" and not flatbuffer.constant(model, graph, place)
    }
    assert len(used) >= 5 and used <= grids


def test_the_int8_file_answers_as_its_graph_does(int8_file: Path, student: Network):
    images = photos(300, 8, seed=1)
    expected = answers(int8_file.with_name("twin.onnx"), images)
    answered = litert.open(int8_file, threads=1)(images).numpy()
    assert (answered.argmax(1) == expected.argmax(1)).mean() >= 0.99
    quanta = numpy.abs(answered - expected).max() / expected.std()
    assert quanta < 0.1
    assert numpy.abs(answered - student(images).detach().numpy()).max() > 1e-3  # it is not the float network
    about = litert.describe(int8_file)
    assert about["operators"]["int8"].items() >= {"CONV_2D": 2, "DEPTHWISE_CONV_2D": 1, "ADD": 1, "MEAN": 1}.items()
    assert about["metadata"] == METADATA
    runs_in = litert.running(int8_file)
    assert runs_in["int8"] == sum(about["operators"]["int8"].values())
    assert runs_in["float"] == {"SUB": 1, "MUL": 1, "QUANTIZE": 1, "DEQUANTIZE": 1, "FULLY_CONNECTED": 1}


def test_a_layer_that_is_to_stay_float_stays_float(student: Network, tmp_path: Path):
    (chosen,) = (name for name in quantize.layers(onnx_format.lower(student)) if "point" in name)
    litert.write_model(quantized(student, Settings(in_float=(chosen,))), tmp_path, {}, "int8")
    about = litert.describe(tmp_path / "model.tflite")
    assert about["operators"]["float"]["CONV_2D"] == 1 and about["operators"]["int8"]["CONV_2D"] == 1
    images = photos(100, 8, seed=1)
    expected = answers(tmp_path / "twin.onnx", images)
    assert numpy.abs(litert.open(tmp_path / "model.tflite")(images).numpy() - expected).max() < 0.1 * expected.std()


def test_two_exports_are_the_same_bytes_and_silent(
    student: Network, float_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    litert.write(network(), tmp_path, METADATA)
    litert.open(tmp_path / "model.tflite", threads=1)(photos(2, 8))
    assert (tmp_path / "model.tflite").read_bytes() == float_file.read_bytes()
    assert str(Path.cwd()).encode() not in float_file.read_bytes()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "other"])
def test_a_damaged_file_is_one_sentence(float_file: Path, tmp_path: Path, damage: str):
    content, path = float_file.read_bytes(), tmp_path / "model.tflite"
    model = flatbuffer.schema().Model.GetRootAs(content, 0)
    flipped = bytearray(content)
    flipped[model._tab.Pos + 2] ^= 0x40  # how far off the table's own layout lies
    changed = {
        "truncated": content[: len(content) // 2],
        "flipped": bytes(flipped),
        "empty": b"",
        "other": b"\x08\x0a" * 99,
    }
    path.write_bytes(changed[damage])
    for what in (litert.open, litert.describe, inspect, judge.open):  # the last in a child, which may die of it
        with pytest.raises(EdgekitError) as caught:
            what(path)
        assert caught.value.exit_code == 2
        assert "\n" not in str(caught.value) and "model.tflite" in str(caught.value)


def test_an_exported_run_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make(tmp_path / "runs/small-1")
    monkeypatch.chdir(tmp_path)
    document = export("runs/small-1", int8=True, formats="litert", ptq="plain")
    assert [one["name"] for one in document["artifacts"]] == ["litert-fp32", "litert-int8"]
    run = runs.Run(Path("runs/small-1"))
    student = models.load(run.student, factory=read(run.recipe_file).student.architecture)
    images = data.load(read(run.recipe_file).data).test.floats()
    for name, least in (("litert-fp32", 1.0), ("litert-int8", 0.95)):
        written = artifact.load(run.artifacts / name)
        answered = predict(judge.open(written, threads=1), images)  # in a child process
        assert (answered.argmax(1) == predict(student, images).argmax(1)).double().mean() >= least
        assert json.loads(litert.describe(written.path)["metadata"]["classes"]) == list(student.classes)
    assert written.record["operators"]["int8"] >= 3 and written.graph == written.folder / "twin.onnx"
    (judged,) = verify(written.folder, attack="pgd5", samples=100)["artifacts"]
    assert judged["twin"]["agreement"] >= 0.98 and {"float", "twin"} <= set(judged["attacks"][0]["sources"])
    about = inspect(written.path)
    assert about["kind"] == "litert" and about["scheme"]["activations"]["signed"]
    shutil.copy(written.graph, tmp_path / "model.tflite")
    with pytest.raises(EdgekitError, match=r"model\.tflite: not a TFLite file"):
        judge.open(tmp_path / "model.tflite")


def test_describing_a_file_with_changed_bytes_is_one_sentence_or_an_answer(float_file: Path, tmp_path: Path):
    assert described("litert", float_file, tmp_path, 150) < 150
