"""ExecuTorch: what is written runs in its delegate, answers as its graph, carries its metadata and survives abuse."""

import json
import struct
import sys
from pathlib import Path

import numpy
import onnx
import pytest
import torch
from damaged import described
from networks import compact, photos
from onnx import numpy_helper
from torch import nn

from edgekit import artifact, inspector, judge, ort, quantize
from edgekit.errors import EdgekitError
from edgekit.formats import executorch
from edgekit.formats import onnx as onnx_format
from edgekit.models import Network
from edgekit.recipe import Student

pytest.importorskip("executorch")

METADATA = {"classes": json.dumps(["ä\n", '"b"', "c", "d"]), "input": '{"shape": [null, 3, 8, 8]}', "outputs": "logits"}


@pytest.fixture(scope="module")
def student() -> Network:
    return compact()


@pytest.fixture(scope="module")
def graph(student: Network) -> onnx.ModelProto:
    return quantize.quantize(onnx_format.lower(student), photos(64, 8), quantize.SCHEMES["signed"]).model


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, student: Network) -> Path:
    folder = tmp_path_factory.mktemp("fp32")
    executorch.write(student, folder, METADATA)
    return folder / "model.pte"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, graph: onnx.ModelProto) -> Path:
    folder = tmp_path_factory.mktemp("int8")
    executorch.write_model(graph, folder, METADATA)
    return folder / "model.pte"


def test_the_float_file_answers_as_the_network_for_any_number_of_images(full: Path, student: Network):
    images = photos(executorch.BATCH + 7, 8)
    expected, opened = student(images).detach(), executorch.open(full, threads=1)
    assert not opened.differentiable
    for count in (0, 1, 2, len(images)):  # the last goes through it in two parts
        answered = opened(images[:count])
        assert answered.shape == (count, 4) and answered.dtype == torch.float32
        assert answered.allclose(expected[:count], atol=1e-5)
    assert opened(images.double()[::2].clone().requires_grad_()).allclose(expected[::2], atol=1e-5)
    assert [path.name for path in full.parent.iterdir()] == ["model.pte"]


def test_images_of_another_shape_are_refused(full: Path):
    with pytest.raises(EdgekitError, match=r"takes images of the shape \[3, 8, 8\], not \[3, 9, 8\]"):
        executorch.open(full, threads=1)(torch.zeros(2, 3, 9, 8))


def test_every_operator_is_delegated_and_every_layer_an_integer_one(full: Path, whole: Path):
    layers = {
        "Conv2d": 3,
        "DepthwiseConv2d": 1,
        "Add": 1,
        "MaxPooling2d": 1,
        "GlobalAvgPooling2d": 1,
        "FullyConnected": 1,
    }
    made = executorch.running(whole)
    assert made["float"] == {"Div": 1, "Subtract": 1}  # the normalization of the image
    whole_operators = executorch.describe(whole)["operators"]["int8"]
    assert {name: whole_operators[name] for name in layers} == layers
    assert made["int8"] == sum(whole_operators.values())
    made = executorch.running(full)
    assert made["int8"] == 0
    assert {name: made["float"][name] for name in layers} == layers
    assert not any("::" in name for name in made["float"])  # kernels outside have the names of torch's operators


def test_an_operator_outside_the_delegate_is_counted_under_its_kernels_name(tmp_path: Path):
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((2, 3)).cumsum(1)

    network = Network(Odd(), Student(architecture="mobilenetv2"), tuple("abc"), (3, 8, 8), (0.5,) * 3, (0.25,) * 3)
    executorch.write(network, tmp_path, {})
    assert executorch.running(tmp_path / "model.pte")["float"]["aten::cumsum"] == 1
    images = photos(3, 8)
    assert executorch.open(tmp_path / "model.pte")(images).allclose(network(images), atol=1e-5)


def test_the_integer_file_answers_as_its_graph_in_another_runtime(whole: Path, graph: onnx.ModelProto):
    images = photos(200, 8, seed=1)
    twin = whole.with_name(artifact.TWIN)
    expected = torch.from_numpy(ort.Session(twin, threads=1)(images.numpy()))
    answered = executorch.open(whole, threads=1)(images)
    spread = (expected.max() - expected.min()).item()
    assert (answered - expected).abs().max() < 0.02 * spread
    assert (answered - expected).abs().mean() < 0.002 * spread
    assert answered.argmax(1).eq(expected.argmax(1)).float().mean() >= 0.99
    metadata = {entry.key: entry.value for entry in onnx.load(twin).metadata_props}
    assert metadata == METADATA


def test_an_image_is_answered_alike_in_any_company(whole: Path):
    opened, images = executorch.open(whole, threads=1), photos(9, 8)
    together = opened(images)
    for place in range(len(images)):
        # The range of what the last layer reads is the image's own.
        assert opened(images[place : place + 1]).allclose(together[place : place + 1], atol=1e-6)


def test_the_integer_file_holds_the_integers_and_no_float_weights(whole: Path, full: Path, graph: onnx.ModelProto):
    stored, found = whole.read_bytes(), 0
    floats = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    for name, weights in floats.items():
        if name.endswith("_quantized") and weights.dtype == numpy.int8 and weights.ndim > 1:
            # XNNPACK's order: outputs, height, width, inputs; a depthwise layer's outputs come last.
            order = (1, 2, 3, 0) if weights.ndim == 4 and weights.shape[1] == 1 else (0, 2, 3, 1)
            laid = weights.transpose(order) if weights.ndim == 4 else weights
            scale = floats[name.replace("_quantized", "_scale")].reshape(-1, *[1] * (weights.ndim - 1))
            real = (weights * scale).astype(numpy.float32)
            assert laid.tobytes() in stored
            assert (real.transpose(order) if real.ndim == 4 else real).tobytes() not in stored
            found += 1
    assert found == 5
    # The same search finds floats where there are some.
    assert compact().body[-1].weight.detach().numpy().tobytes() in full.read_bytes()  # pyright: ignore


def test_the_metadata_is_in_the_file_for_edgekit_and_for_an_app(full: Path, whole: Path):
    runtime = executorch.package()
    for path in (full, whole):
        about = executorch.describe(path)
        assert about["metadata"] == METADATA
        assert about["input"] == {"name": "images", "shape": ["batch", 3, 8, 8], "batch": executorch.BATCH}
        assert about["bytes"] == path.stat().st_size
        program = runtime._load_program(str(path))
        assert {key: program.load_method(key)([])[0] for key in METADATA} == METADATA
    seen = inspector.inspect(whole)
    assert seen["kind"] == "executorch" and seen["metadata"] == METADATA


def test_two_exports_are_the_same_bytes_and_say_nothing(
    whole: Path, graph: onnx.ModelProto, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    executorch.write_model(graph, tmp_path, METADATA)
    executorch.open(tmp_path / "model.pte", threads=1)(photos(2, 8))
    assert capfd.readouterr() == ("", "")
    assert (tmp_path / "model.pte").read_bytes() == whole.read_bytes()


def test_a_file_goes_on_answering_where_another_is_opened_with_other_threads(full: Path):
    images = photos(5, 8)
    first = executorch.open(full, threads=1)
    expected = first(images)
    second = executorch.open(full, threads=2)
    assert second(images).allclose(expected, atol=1e-5)
    assert first(images).equal(expected)
    assert executorch.package()._threadpool_get_thread_count() == 1


@pytest.mark.parametrize("damage", ["truncated", "shortened", "empty", "other", "header", "program"])
def test_a_damaged_file_is_one_sentence(full: Path, tmp_path: Path, damage: str):
    content = full.read_bytes()
    path = tmp_path / "model.pte"
    path.write_bytes(
        {
            "truncated": content[: len(content) // 2],
            "shortened": content[:-1],
            "empty": b"",
            "other": b"\x00PNG" * 99,
            "header": content[:16] + struct.pack("<Q", 2**60) + content[24:],
            "program": content[:64] + bytes(200) + content[264:],
        }[damage]
    )
    for what in (executorch.open, executorch.describe, executorch.running):
        with pytest.raises(EdgekitError) as caught:
            what(path)
        assert "\n" not in str(caught.value) and "model.pte" in str(caught.value)
        assert caught.value.exit_code == 2


def test_bits_that_flip_are_one_sentence_or_change_nothing_else_in_this_process(whole: Path, tmp_path: Path):
    content, path = bytearray(whole.read_bytes()), tmp_path / "model.pte"
    begin = executorch._HEADER.unpack_from(content)[4]
    for place in range(begin + 128, begin + 128 + 40, 4):  # what XNNPACK's part begins with
        content[place] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(EdgekitError) as caught:
        judge.open(path, threads=1)(photos(2, 8))
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_where_the_package_is_missing_a_sentence_says_how_to_get_it(full: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "executorch.extension.pybindings", None)
    with pytest.raises(
        EdgekitError, match=r"executorch is not installed. Run: pip install 'edgekit\[executorch\]'"
    ) as e:
        executorch.open(full)
    assert e.value.exit_code == 4


def test_describing_a_file_with_changed_bytes_is_one_sentence_or_an_answer(full: Path, tmp_path: Path):
    assert described("executorch", full, tmp_path, 25) < 25
