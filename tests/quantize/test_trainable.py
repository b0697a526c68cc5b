"""The graphs that quantization-aware training trains, against the file in its own runtime and against sums by hand."""

import functools
from pathlib import Path

import numpy
import onnx
import pytest
import torch
from networks import network, photos
from onnx import TensorProto, helper, numpy_helper

from edgekit.classifier import predict
from edgekit.formats import onnx as format
from edgekit.models import Network
from edgekit.models.fold import fold
from edgekit.quantize import SCHEMES, Settings, layers, quantize
from edgekit.quantize.trainable import FakeQuantized, Folded

SCHEME = SCHEMES["x86"]


def answered(model: onnx.ModelProto, images: torch.Tensor, folder: Path) -> torch.Tensor:
    folder.mkdir()
    format.write_model(model, folder, {})
    return predict(format.open(folder / format.FILE, threads=1), images)


def trained(student: FakeQuantized, images: torch.Tensor, target: torch.Tensor, rate: float = 1e-3) -> None:
    optimizer = torch.optim.SGD(student.parameters(), rate)
    for _ in range(3):
        optimizer.zero_grad()
        (student(images) - target).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1)
        optimizer.step()


@functools.cache
def lowered(architecture: str) -> tuple[Network, onnx.ModelProto]:
    """A student and its fp32 graph, once: torch's exporter takes seconds."""
    return (made := network(architecture)), format.lower(made)


@pytest.mark.parametrize("architecture", ["mobilenetv2", "resnet18"])
def test_the_trained_network_answers_as_its_file_does_bit_for_bit(tmp_path: Path, architecture: str):
    (like, source), images = lowered(architecture), photos(40)
    made = quantize(source, photos(32, seed=1), SCHEME)
    student = FakeQuantized(made, like)
    # Before the first step it is the file that it was made of.
    assert student.model().SerializeToString(deterministic=True) == made.model.SerializeToString(deterministic=True)
    trained(student, images, like(images).detach().flip(0))
    kinds = student(images), fold(student)(images), predict(student, images)  # trained, attacked, validated
    first = answered(student.model(), images, tmp_path / "trained")
    assert all(kind.equal(first) for kind in kinds)
    assert not first.equal(answered(made.model, images, tmp_path / "before"))
    student.measure(quantize(Folded.model(student), photos(32, seed=2), SCHEME))
    second = answered(student.model(), images, tmp_path / "measured")
    assert predict(student, images).equal(second)
    assert not second.equal(first)
    # The state that a checkpoint keeps holds the ranges too.
    other = FakeQuantized(made, like)
    other.load_state_dict(student.state_dict())
    assert predict(other, images).equal(second)


def test_a_layer_that_stays_float_is_trained_in_float(tmp_path: Path):
    (like, source), images = lowered("mobilenetv2"), photos(40)
    name = layers(source)[2]
    student = FakeQuantized(quantize(source, photos(32, seed=1), SCHEME, Settings(in_float=(name,))), like)
    before = student.weights[student.names.index(f"{name}.weight")].detach().clone()
    trained(student, images, like(images).detach().flip(0), rate=0.1)
    after = student.weights[student.names.index(f"{name}.weight")]
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in student.model().graph.initializer}
    assert not after.equal(before)
    assert numpy.array_equal(held[f"{name}.weight"], after.detach().numpy())
    # A float kernel's last bit may move an integer by one, here and there.
    mine, theirs = predict(student, images), answered(student.model(), images, tmp_path / "file")
    assert (mine - theirs).abs().max() < 0.2 * theirs.std()


def test_the_float_graph_is_the_student_and_so_are_its_gradients(tmp_path: Path):
    (like, source), images = lowered("mobilenetv2"), photos(8)
    control = Folded(quantize(source, images, SCHEME).source, like)
    assert torch.allclose(control(images), like(images), atol=1e-4)
    control(images).square().sum().backward()
    gradient = dict(zip(control.names, control.weights, strict=True))["body.classify.weight"].grad
    like.zero_grad()
    like(images).square().sum().backward()
    assert gradient is not None
    assert torch.allclose(gradient, like.body.classify.weight.grad, rtol=1e-3, atol=1e-2)  # pyright: ignore
    assert torch.allclose(answered(control.model(), images, tmp_path / "file"), like(images), atol=1e-4)


def by_hand() -> onnx.ModelProto:
    """image (N, 1, 1, 1) -> relu(1.0 x), relu(-1.0 x) -> two logits."""
    constants = {
        "w": numpy.array([1.0, -1.0], numpy.float32).reshape(2, 1, 1, 1),
        "b": numpy.zeros(2, numpy.float32),
        "v": numpy.array([[0.5, 0.25], [-2.0, 1.0]], numpy.float32),
        "c": numpy.zeros(2, numpy.float32),
    }
    nodes = [
        helper.make_node("Conv", ["images", "w", "b"], ["conv"]),
        helper.make_node("Relu", ["conv"], ["relu"]),
        helper.make_node("Flatten", ["relu"], ["flat"]),
        helper.make_node("Gemm", ["flat", "v", "c"], ["logits"], transB=1),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("images", ["N", 1, 1, 1]), ("logits", ["N", 2]))
    ]
    held = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "by hand", ends[:1], ends[1:], held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("pixel", [0.4, 0.8])
def test_what_saturates_passes_no_gradient(pixel: float):
    student = FakeQuantized(quantize(by_hand(), torch.linspace(0, 0.5, 9).view(9, 1, 1, 1), SCHEME), network())
    images = torch.full((1, 1, 1, 1), pixel).requires_grad_()
    student(images).sum().backward()
    inside = pixel <= 0.5
    # Of the two channels the negative one is cut to 0; the weights are on the grid already, but for 0.5 and 0.25.
    row = round(0.5 * 64 / 0.5) * 0.5 / 64 + round(-2.0 * 64 / 2.0) * 2.0 / 64
    assert images.grad is not None
    assert images.grad.item() == pytest.approx(row * 1.0 if inside else 0.0, rel=1e-5)
    seen = round(min(pixel, 0.5) * 255 / 0.5) * 0.5 / 255
    gradients = {name: weight.grad for name, weight in zip(student.names, student.weights, strict=True)}
    assert gradients["w"].flatten().tolist() == pytest.approx([row * seen, 0.0], rel=1e-5)
    assert gradients["v"].flatten().tolist() == pytest.approx([seen, 0.0, seen, 0.0], rel=1e-5)


def test_weights_beyond_their_range_pass_no_gradient_and_come_to_lie_on_its_end():
    student = FakeQuantized(quantize(by_hand(), torch.linspace(0, 0.5, 9).view(9, 1, 1, 1), SCHEME), network())
    place = student.names.index("w")
    with torch.no_grad():
        student.weights[place][0] *= 1.5
    student(torch.full((1, 1, 1, 1), 0.2)).sum().backward()
    assert student.weights[place].grad.flatten()[0] == 0  # pyright: ignore
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in student.model().graph.initializer}
    assert held["w_quantized"].flatten().tolist() == [64, -64]
