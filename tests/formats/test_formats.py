"""Every format: what is written opens, answers as the network, carries its metadata and survives abuse."""

import json
import shutil
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy
import onnx
import pytest
import torch
from networks import network, photos

from edgekit.errors import EdgekitError
from edgekit.formats import FORMATS, lacking
from edgekit.formats import onnx as onnx_format

NAMES = ["ä\n", '"b"', "c"] + ["d"] * 7
METADATA = {
    "classes": json.dumps(NAMES),
    "input": json.dumps({"shape": [None, 3, 16, 16], "layout": "NCHW", "range": [0, 1], "normalization": "inside"}),
    "outputs": "logits",
    "edgekit": "0",
}
HERE = [
    name
    for name, format in FORMATS.items()
    if lacking(name) is None and all(find_spec(package) for package in format.PACKAGES)
]
# ncnn names its weights as OpenVINO does; ExecuTorch takes twenty seconds to write a network of this depth, LiteRT ten.
TOGETHER = [name for name in HERE if name not in ("ncnn", "executorch", "litert")]
FILES = [
    ("onnx", "model.onnx"),
    ("torchscript", "model.pt"),
    ("torchscript", "model.ptl"),
    pytest.param("openvino", "model.xml", marks=pytest.mark.skipif("openvino" not in HERE, reason="not installed")),
]
BESIDE = {"model.xml": "model.bin"}
each_file = pytest.mark.parametrize(("name", "file"), FILES)


@pytest.fixture(scope="module")
def student():
    return network()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, student) -> Path:
    folder = tmp_path_factory.mktemp("written")
    for name in TOGETHER:
        FORMATS[name].write(student, folder, METADATA)
    return folder


def test_each_format_writes_these_files_and_no_other(written: Path):
    expected = [file for name in TOGETHER for file in FORMATS[name].OPENED]
    expected += [BESIDE[file] for file in expected if file in BESIDE]
    assert sorted(path.name for path in written.iterdir()) == sorted(expected)
    assert {"model.onnx", "model.pt", "model.ptl"} <= set(expected)


@each_file
def test_what_is_written_answers_as_the_network(written: Path, student, name: str, file: str):
    images = photos(7)
    judge = FORMATS[name].open(written / file, threads=1)
    assert not judge.differentiable
    expected = student(images).detach()
    for count in (0, 1, 7):
        answered = judge(images[:count])
        assert answered.shape == (count, 10)
        assert answered.dtype == torch.float32
        assert answered.allclose(expected[:count], atol=1e-4)
        assert not answered.requires_grad
    assert judge(images.to(memory_format=torch.channels_last)).allclose(expected, atol=1e-4)
    assert judge(images.flip(3).flip(3)[::2]).allclose(expected[::2], atol=1e-4)
    assert judge(images.clone().requires_grad_()).allclose(expected, atol=1e-4)
    assert judge(images.double()).allclose(expected, atol=1e-4)
    assert judge(images).equal(judge(images))


def test_the_precise_arithmetic_changes_nothing_in_a_float_file(written: Path):
    images = photos(7)
    exact = onnx_format.open(written / "model.onnx", threads=1, precise=True)(images)
    assert exact.equal(onnx_format.open(written / "model.onnx", threads=1)(images))


@each_file
def test_the_file_describes_itself(written: Path, name: str, file: str):
    about = FORMATS[name].describe(written / file)
    assert about["metadata"] == METADATA
    assert json.loads(about["metadata"]["classes"]) == NAMES
    shipped = [file, *([BESIDE[file]] if file in BESIDE else [])]
    assert about["bytes"] == sum((written / each).stat().st_size for each in shipped)
    assert about["input"]["name"] == "images"
    assert about["input"]["shape"][1:] == [3, 16, 16]
    assert set(about["operators"]) == {"float"}
    kinds = about["operators"]["float"]
    assert not any("norm" in kind.lower() for kind in kinds)  # folded into the convolutions
    convolutions = sum(count for kind, count in kinds.items() if "conv" in kind.lower())
    assert convolutions == 52  # stem, 17 blocks (16 of three, one of two), head


def test_a_constant_without_inputs_is_counted_among_the_floats(tmp_path: Path):
    nodes = [
        onnx.helper.make_node("Constant", [], ["c"], value_float=1.0),
        onnx.helper.make_node("DequantizeLinear", ["q", "c"], ["d"]),
        onnx.helper.make_node("Relu", ["d"], ["y"]),
    ]
    value = onnx.helper.make_tensor_value_info("q", onnx.TensorProto.UINT8, ["batch", 3, 4, 4])
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [value], [])), tmp_path / "model.onnx")
    about = onnx_format.describe(tmp_path / "model.onnx")
    assert about["operators"] == {"int8": {"Relu": 1}, "float": {"Constant": 1}}
    assert about["input"] == {"name": "q", "shape": ["batch", 3, 4, 4]}


def test_onnx_is_valid_dynamic_in_the_batch_and_tells_nothing_of_this_machine(written: Path):
    model = onnx.load(written / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    (inside,), (outside,) = model.graph.input, model.graph.output
    assert (inside.name, outside.name) == ("images", "logits")
    assert [d.dim_param or d.dim_value for d in inside.type.tensor_type.shape.dim] == ["batch", 3, 16, 16]
    assert [d.dim_param or d.dim_value for d in outside.type.tensor_type.shape.dim] == ["batch", 10]
    assert str(Path.cwd()).encode() not in (written / "model.onnx").read_bytes()
    assert b".py" not in (written / "model.onnx").read_bytes()


def test_onnx_bytes_depend_on_the_student_alone(written: Path, tmp_path: Path):
    onnx_format.write(network(), tmp_path, METADATA)
    assert (tmp_path / "model.onnx").read_bytes() == (written / "model.onnx").read_bytes()


@pytest.mark.parametrize("name", [*TOGETHER, *(name for name in HERE if name == "ncnn")])
def test_writing_and_opening_say_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str], student, name: str):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FORMATS[name].write(student, tmp_path, METADATA)
        for file in FORMATS[name].OPENED:
            FORMATS[name].open(tmp_path / file, threads=1)(photos(2))
            FORMATS[name].describe(tmp_path / file)
    assert capfd.readouterr() == ("", "")


@each_file
@pytest.mark.parametrize("damage", ["truncated", "empty", "other"])
def test_a_damaged_file_is_one_sentence(written: Path, tmp_path: Path, name: str, file: str, damage: str):
    path, whole = tmp_path / file, (written / file).read_bytes()
    if file in BESIDE:
        shutil.copy(written / BESIDE[file], tmp_path)
    path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "other": b"\x00PNG" * 99}[damage])
    for what in (FORMATS[name].open, FORMATS[name].describe):
        with pytest.raises(EdgekitError) as caught:
            what(path)
        assert "\n" not in str(caught.value)
        assert file in str(caught.value)


@each_file
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_an_error_that_can_be_caught(written: Path, tmp_path: Path, student, name: str, file: str):
    (tmp_path / file).symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        if name == "onnx":
            onnx_format.write_model(onnx.load(written / file), tmp_path, METADATA)
        else:
            FORMATS[name].write(student, tmp_path, METADATA)


def test_a_shape_the_network_was_not_made_for_is_no_answer_of_an_onnx_file(written: Path):
    with pytest.raises(Exception, match="dimensions"):
        onnx_format.open(written / "model.onnx", threads=1)(photos(2, size=20))


def test_plain_onnxruntime_needs_no_edgekit(written: Path, tmp_path: Path, student):
    import onnxruntime

    shutil.copy(written / "model.onnx", tmp_path / "elsewhere.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "elsewhere.onnx", providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map == METADATA
    (logits,) = session.run(["logits"], {"images": photos(3).numpy()})
    assert numpy.allclose(numpy.asarray(logits), student(photos(3)).detach().numpy(), atol=1e-4)
