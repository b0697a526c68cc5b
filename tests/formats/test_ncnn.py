"""ncnn: .param and .bin answer as the graph that they were made of, and what damages them is one sentence."""

import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import numpy
import onnx
import pytest
import torch
from damaged import described
from networks import network, photos
from onnx import TensorProto, helper, numpy_helper
from test_exporter import make

import edgekit
from edgekit import artifact, judge, quantize, trial, twin
from edgekit.bencher import bench
from edgekit.errors import EdgekitError
from edgekit.exporter import export
from edgekit.formats import ncnn, ncnnparam
from edgekit.formats import onnx as onnx_format
from edgekit.inspector import inspect
from edgekit.verifier import verify

pytest.importorskip("ncnn")

SIZE = 13  # no multiple of anything: ncnn pads each channel
NAMES = ["ä\n", '"b"', "# edgekit"] + ["d"] * 7
METADATA = {"classes": json.dumps(NAMES), "input": json.dumps({"shape": [None, 3, SIZE, SIZE]}), "edgekit": "0"}


@pytest.fixture(scope="module")
def students() -> dict[str, Any]:
    return {name: network(name, SIZE) for name in ("resnet18",)}


@pytest.fixture(scope="module")
def lowered(students: dict[str, Any]) -> dict[str, onnx.ModelProto]:
    return {name: onnx_format.lower(student) for name, student in students.items()}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, lowered: dict[str, onnx.ModelProto]) -> Path:
    """NAME-PRECISION/model.param of each student; read-only."""
    folder = tmp_path_factory.mktemp("written")
    for name, model in lowered.items():
        made = quantize.quantize(model, photos(64, SIZE, seed=1), quantize.SCHEMES[ncnn.SCHEME]).model
        for precision in ncnn.PRECISIONS:
            place = folder / f"{name}-{precision}"
            place.mkdir()
            ncnn.write_model(made if precision == "int8" else model, place, METADATA, precision)
    return folder


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", ["resnet18"])
def test_a_float_file_answers_as_the_network(written: Path, students: dict[str, Any], name: str, precision: str):
    images = photos(7, SIZE)
    opened = ncnn.open(written / f"{name}-{precision}/model.param", threads=1)
    expected = students[name](images).detach()
    within = (1e-5 if precision == "fp32" else 5e-3) * expected.abs().max().item()
    for count in (0, 1, 7):
        answered = opened(images[:count])
        assert answered.shape == (count, 10) and answered.dtype == torch.float32
        assert answered.allclose(expected[:count], atol=within)
    assert not opened.differentiable
    assert opened(images.to(memory_format=torch.channels_last)).allclose(expected, atol=within)
    assert opened(images.flip(3).flip(3)[::2].double()).allclose(expected[::2], atol=within)
    sizes = {each: (written / f"{name}-{each}/model.bin").stat().st_size for each in ncnn.PRECISIONS}
    assert sizes["int8"] < 0.35 * sizes["fp32"] and sizes["fp16"] < 0.52 * sizes["fp32"]


@pytest.mark.parametrize("name", ["resnet18"])
def test_an_int8_file_answers_as_its_graph_in_onnx_runtime_and_as_its_twin(written: Path, name: str):
    folder, images = written / f"{name}-int8", photos(60, SIZE, seed=2)
    answered = ncnn.open(folder / "model.param", threads=1)(images)
    there = onnx_format.open(folder / artifact.TWIN, threads=1, precise=True, optimization="none")(images)
    copied = twin.open(folder / artifact.TWIN)(images).detach()
    for other in (there, copied):  # a quantum here and there
        assert (answered - other).abs().mean() < 0.02 * other.std()
        assert (answered.argmax(1) == other.argmax(1)).double().mean() >= 0.98
    plain = ncnn.open(written / f"{name}-fp32/model.param", threads=1)(images)
    assert (answered - plain).abs().max() > 1e-3  # it is another file


def test_one_layer_on_integers_is_the_formula_of_its_scales(tmp_path: Path):
    """Two convolutions and a matrix product, in numpy, from the integers that were to be written."""
    generator = numpy.random.default_rng(0)
    weights = [generator.integers(-127, 128, shape, dtype=numpy.int8) for shape in ((5, 3, 3, 3), (4, 5, 1, 1), (6, 4))]
    scales = [generator.uniform(0.001, 0.01, len(one)).astype("f4") for one in weights]
    grids = [numpy.float32(value) for value in (0.008, 0.05, 0.02)]
    constants, nodes, source = dict[str, Any](), list[Any](), "images"
    for number, (kind, result) in enumerate((("Conv", "a"), ("Conv", "b"), ("Gemm", "logits"))):
        constants |= {f"w{number}": weights[number], f"s{number}": scales[number], f"g{number}": grids[number]}
        constants |= {f"z{number}": numpy.int8(0), f"zeros{number}": numpy.zeros(len(scales[number]), "i1")}
        turned: dict[str, Any] = {"transB": 1} if kind == "Gemm" else {}
        if kind == "Gemm":
            nodes += [helper.make_node("GlobalAveragePool", [source], ["p"]), helper.make_node("Flatten", ["p"], ["f"])]
            source = "f"
        nodes += [
            helper.make_node("QuantizeLinear", [source, f"g{number}", f"z{number}"], [f"q{number}"]),
            helper.make_node("DequantizeLinear", [f"q{number}", f"g{number}", f"z{number}"], [f"d{number}"]),
            helper.make_node(
                "DequantizeLinear", [f"w{number}", f"s{number}", f"zeros{number}"], [f"v{number}"], axis=0
            ),
            helper.make_node(kind, [f"d{number}", f"v{number}"], [result], **turned),
        ]
        if kind == "Conv":
            nodes.append(helper.make_node("Relu", [result], [f"{result}_act"]))
        source = f"{result}_act"
    answered = opened(tmp_path, nodes, constants, (3, 6, 7), "int8")(images := torch.rand(8, 3, 6, 7))

    def rounded(value: numpy.ndarray, grid: numpy.float32) -> numpy.ndarray:
        return numpy.clip(numpy.rint(value / grid), -127, 127)

    windows = numpy.lib.stride_tricks.sliding_window_view(rounded(images.numpy(), grids[0]), (3, 3), (2, 3))
    first = numpy.einsum("nchwij,ocij->nohw", windows, weights[0].astype(float))
    first = numpy.maximum(first * (scales[0] * grids[0])[:, None, None], 0)
    second = numpy.einsum("nchw,oc->nohw", rounded(first, grids[1]), weights[1][:, :, 0, 0].astype(float))
    second = numpy.maximum(second * (scales[1] * grids[1])[:, None, None], 0)
    expected = rounded(second.mean((2, 3)), grids[2]) @ weights[2].T.astype(float) * (scales[2] * grids[2])
    assert numpy.abs(answered.numpy() - expected).max() < 1e-5 * numpy.abs(expected).max()
    lines = (tmp_path / "model.param").read_text().splitlines()
    # What the second convolution alone reads the first one rounds itself; a mean is of floats.
    assert [word for line in lines for word in line.split() if word.startswith("8=")] == ["8=101", "8=1", "8=1"]


def opened(folder: Path, nodes: list[Any], constants: dict[str, Any], shape: tuple[int, ...], precision: str = "fp32"):
    """A graph from `images` to `logits`, written and opened."""
    model = graph(nodes, constants, shape)
    ncnn.write_model(model, folder, {}, precision)
    return ncnn.open(folder / "model.param", threads=1)


def graph(nodes: list[Any], constants: dict[str, Any], shape: tuple[int, ...]) -> onnx.ModelProto:
    stored = [numpy_helper.from_array(numpy.asarray(value), name) for name, value in constants.items()]
    image = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", *shape])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "classes"])
    body = helper.make_graph(nodes, "graph", [image], [logits], stored)
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_every_operator_that_is_written_answers_as_in_onnx_runtime(tmp_path: Path):
    random = numpy.random.default_rng(1)
    weights = {"w": (4, 4, 3, 2), "g": (8, 2, 3, 3), "k": (4, 1, 3, 3), "m": (12, 5)}
    constants = {name: random.normal(size=shape).astype("f4") for name, shape in weights.items()}
    constants |= {"b": random.normal(size=4).astype("f4"), "n": random.normal(size=5).astype("f4")}
    constants |= {name: random.uniform(0.5, 2, 4).astype("f4") for name in ("slope", "shift", "mean", "variance")}
    constants |= {"two": numpy.float32(2), "each": random.uniform(1, 2, (1, 4, 1, 1)).astype("f4")}
    constants |= {"low": numpy.float32(-0.25), "high": numpy.float32(1.5), "plane": numpy.array([2, 3])}
    constants |= {"lowest": numpy.finfo("f4").min, "flat": numpy.array([0, -1])}
    node = helper.make_node
    pads: dict[str, Any] = {"kernel_shape": [3, 3], "pads": [1, 0, 1, 1], "strides": [2, 1]}
    nodes = [
        node("Conv", ["images", "w", "b"], ["c"], pads=[0, 1, 2, 0], strides=[1, 2], dilations=[2, 1]),
        node("Clip", ["c", "low", "high"], ["c1"]),
        node("Conv", ["c1", "k"], ["c2"], pads=[1, 1, 1, 1], group=4),
        node("BatchNormalization", ["c2", "slope", "shift", "mean", "variance"], ["c3"], epsilon=0.01),
        node("Sigmoid", ["c3"], ["c4"]),
        node("Mul", ["c4", "c2"], ["c5"]),
        node("Sub", ["two", "c5"], ["c6"]),
        node("Div", ["c6", "each"], ["c7"]),
        node("HardSwish", ["c7"], ["c8"]),
        node("Tanh", ["c8"], ["c9"]),
        node("Max", ["c9", "lowest"], ["c10"]),
        node("GlobalAveragePool", ["c10"], ["gate"]),
        node("Mul", ["c10", "gate"], ["gated"]),  # a vector of channels, as squeeze-and-excitation has it
        node("MaxPool", ["gated"], ["x"], **pads),
        node("AveragePool", ["gated"], ["y"], count_include_pad=1, **pads),
        node("AveragePool", ["gated"], ["z"], **pads),
        node("Add", ["x", "y"], ["xy"]),
        node("Concat", ["xy", "z"], ["wide"], axis=1),
        node("Conv", ["wide", "g"], ["grouped"], pads=[1, 1, 1, 1], group=4),
        node("Relu", ["grouped"], ["relu"]),
        node("Clip", ["relu", "", "high"], ["cut"]),
        node("Concat", ["cut", "z"], ["twelve"], axis=1),
        node("ReduceMean", ["twelve", "plane"], ["pooled"], keepdims=1),
        node("Reshape", ["pooled", "flat"], ["vector"]),
        node("Gemm", ["vector", "m", "n"], ["scores"]),
        node("Identity", ["scores"], ["last"]),
        node("Relu", ["last"], ["logits"]),
    ]
    images, model = torch.rand(5, 4, 9, 11), graph(nodes, constants, (4, 9, 11))
    answered = opened(tmp_path, nodes, constants, (4, 9, 11))(images)
    onnx.save(model, tmp_path / "model.onnx")
    expected = onnx_format.open(tmp_path / "model.onnx", threads=1)(images)
    assert expected.std() > 0.1
    assert answered.allclose(expected, atol=1e-5)


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ([helper.make_node("Softplus", ["images"], ["logits"])], "the operator Softplus is not written to .param"),
        ([helper.make_node("Max", ["images", "two"], ["logits"])], "the operator Max is not written to .param"),
        ([helper.make_node("Flatten", ["images"], ["logits"], axis=2)], "Flatten to another shape"),
        ([helper.make_node("Mul", ["images", "row"], ["logits"])], "the constant row is neither"),
        ([helper.make_node("Conv", ["images", "images"], ["logits"])], "the weights of logits are computed"),
    ],
)
def test_what_is_not_written_is_named(nodes: list[Any], said: str):
    with pytest.raises(EdgekitError, match=said):
        ncnnparam.lower(graph(nodes, {"two": numpy.float32(2), "row": numpy.ones((1, 1, 1, 4), "f4")}, (3, 4, 4)))


@pytest.mark.parametrize(("scheme", "said"), [("symmetric", "ncnn has floats there"), ("x86", "with a zero point")])
def test_a_graph_for_another_runtime_is_refused(lowered: dict[str, onnx.ModelProto], scheme: str, said: str):
    model = lowered["resnet18"]
    with pytest.raises(EdgekitError, match=said):
        ncnnparam.lower(quantize.quantize(model, photos(8, SIZE), quantize.SCHEMES[scheme]).model)


def test_weights_beyond_16_bits_are_refused():
    nodes = [helper.make_node("Conv", ["images", "w"], ["logits"])]
    with pytest.raises(EdgekitError, match="w has weights too large for 16 bits"):
        ncnnparam.lower(graph(nodes, {"w": numpy.full((1, 1, 1, 1), 7e4, "f4")}, (1, 4, 4)), half=True)


def test_the_file_describes_itself_and_tells_nothing_of_this_machine(written: Path, tmp_path: Path):
    about = ncnn.describe(written / "resnet18-int8/model.param")
    assert about["metadata"] == METADATA and json.loads(about["metadata"]["classes"]) == NAMES
    assert about["input"] == {"name": "images", "shape": [1, 3, SIZE, SIZE]}
    folder = written / "resnet18-int8"
    assert about["bytes"] == sum((folder / name).stat().st_size for name in ("model.param", "model.bin"))
    kinds = about["operators"]["int8"]
    assert kinds == {"Convolution": 20, "InnerProduct": 1}
    assert about["operators"]["float"] == {"BinaryOp": 10, "Pooling": 1, "ReLU": 8}
    assert ncnn.running(folder / "model.param") == {"int8": 21, "float": about["operators"]["float"]}
    contents = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        ncnn.write(trial.small(), tmp_path / name, METADATA)
        contents.append([(tmp_path / name / file).read_bytes() for file in ("model.param", "model.bin")])
    assert contents[0] == contents[1]
    assert str(Path.cwd()).encode() not in contents[0][0] and str(tmp_path.parent).encode() not in contents[0][0]


def test_images_of_another_size_are_refused(written: Path):
    with pytest.raises(EdgekitError, match=r"takes images of the shape \['batch', 3, 13, 13\]"):
        ncnn.open(written / "resnet18-fp32/model.param")(torch.zeros(2, 3, 9, 9))


@pytest.mark.parametrize("damage", ["truncated", "empty", "other", "lines", "weights", "short", "none"])
def test_a_damaged_file_is_one_sentence_before_ncnn_sees_it(written: Path, tmp_path: Path, damage: str):
    shutil.copytree(written / "resnet18-int8", tmp_path, dirs_exist_ok=True)
    file, weights = tmp_path / "model.param", tmp_path / "model.bin"
    whole, stored = file.read_bytes(), bytearray(weights.read_bytes())
    stored[len(stored) // 2] ^= 1
    if damage in ("truncated", "empty", "other", "lines"):
        lines = whole.split(b"\n")
        broken = {"truncated": whole[: len(whole) // 2], "empty": b"", "lines": b"\n".join(lines[:9] + lines[10:])}
        file.write_bytes(broken.get(damage, (tmp_path / artifact.TWIN).read_bytes()))
    elif damage == "none":
        weights.unlink()
    else:
        weights.write_bytes(stored if damage == "weights" else stored[:-8])
    for what in (ncnn.open, ncnn.describe):
        with pytest.raises(EdgekitError, match=r"model\.(param|bin): ") as caught:
            what(file)
        assert "\n" not in str(caught.value) and caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("before", "after"),
    [("0=10 ", "0=1000000000 "), ("Convolution ", "Konvolution ")],
)
def test_a_file_that_ncnn_does_not_survive_is_one_sentence(written: Path, tmp_path: Path, before: str, after: str):
    """In the judge's child process: what kills the runtime kills no command."""
    folder = written / "resnet18-fp32"
    text = (folder / "model.param").read_text()
    assert before in text
    (tmp_path / "model.param").write_text(text.replace(before, after))
    shutil.copy(folder / "model.bin", tmp_path)
    with pytest.raises(EdgekitError) as caught:
        judge.open(tmp_path / "model.param", threads=1)(photos(1, SIZE))
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2 and "model.param" in str(caught.value)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The int8 artifact of a small run, exported with its fp32 one."""
    folder = tmp_path_factory.mktemp("run")
    make(folder / "runs/small-1")
    export(folder / "runs/small-1", int8=True, formats="ncnn", ptq="plain")
    return folder / "runs/small-1/artifacts/ncnn-int8"


def test_an_artifact_is_verified_benched_and_inspected(exported: Path):
    written = artifact.load(exported)
    jsonschema.validate(
        written.record, json.loads((Path(edgekit.__file__).parent / "schemas/artifact.json").read_text())
    )
    assert {file["path"] for file in written.record["files"]} == {"model.param", "model.bin", "twin.onnx"}
    assert written.record["scheme"]["only"] == ["Conv", "Gemm"]
    (judged,) = verify(exported, attack="pgd5", samples=40)["artifacts"]
    assert judged["twin"]["agreement"] >= 0.98 and judged["bytes"] == written.bytes
    assert {"float", "twin"} <= set(judged["attacks"][0]["sources"])
    about = inspect(exported / "model.param")
    assert about["kind"] == "ncnn" and about["made_from"] == written.record["made_from"]
    measured = bench(exported, batch=2, threads=1, rounds=3)["artifacts"][0]
    assert measured["operators"]["int8"] >= 3 and measured["bytes"] == written.bytes


def test_the_doctor_tries_it():
    assert trial.format("ncnn") == f"fp32, fp16 and int8: written, opened and compared in {judge.runtime('ncnn')}"


def test_describing_a_file_with_changed_bytes_is_one_sentence_or_an_answer(written: Path, tmp_path: Path):
    assert described("ncnn", written / "resnet18-fp32" / "model.param", tmp_path, 150) < 150
