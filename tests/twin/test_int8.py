from pathlib import Path

import onnx
import pytest
import torch
from networks import network, photos
from torch import Tensor

from edgekit import twin
from edgekit.classifier import predict
from edgekit.errors import EdgekitError
from edgekit.formats import onnx as format
from edgekit.quantize import SCHEMES, quantize
from edgekit.twin.integers import Round


def int8_file(folder: Path, architecture: str) -> Path:
    made = quantize(format.lower(network(architecture)), photos(64, seed=1), SCHEMES["x86"])
    format.write_model(made.model, folder, {})
    return folder / "model.onnx"


@pytest.mark.parametrize("architecture", ["mobilenetv2", "resnet18"])
def test_the_twin_of_an_int8_file_answers_bit_for_bit(tmp_path: Path, architecture: str):
    path, images = int8_file(tmp_path, architecture), photos(200)
    assert predict(twin.open(path), images).equal(predict(format.open(path, threads=1), images))
    noise = torch.rand(100, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    assert predict(twin.open(path), noise).equal(predict(format.open(path, threads=1), noise))


@pytest.mark.parametrize("architecture", ["mobilenetv2", "resnet18", "wideresnet"])
def test_the_twin_of_a_float_file_answers_as_the_network(tmp_path: Path, architecture: str):
    student = network(architecture, width=1 if architecture == "wideresnet" else 0.25)
    format.write(student, tmp_path, {})
    copy, images = twin.open(tmp_path / "model.onnx"), photos(20).requires_grad_()
    assert copy(images).allclose(student(images), atol=1e-4)
    (mine,) = torch.autograd.grad(copy(images).logsumexp(1).sum(), images)
    (theirs,) = torch.autograd.grad(student(images).logsumexp(1).sum(), images)
    assert mine.allclose(theirs, atol=1e-3 * theirs.abs().max().item())


def test_gradients_of_the_int8_twin_point_where_the_network_points(tmp_path: Path):
    student, images = network(), photos(50).requires_grad_()
    copy = twin.open(int8_file(tmp_path, "mobilenetv2"))
    (mine,) = torch.autograd.grad(copy(images).logsumexp(1).sum(), images)
    (theirs,) = torch.autograd.grad(student(images).logsumexp(1).sum(), images)
    assert torch.cosine_similarity(mine.flatten(1), theirs.flatten(1)).mean() > 0.7


def test_rounding_passes_gradients_straight_through_but_not_where_it_clips():
    values = torch.tensor([-300.0, -1.2, 0.4, 0.6, 90.0, 200.0, 1000.0], requires_grad=True)
    factor = torch.tensor(0.5)
    rounded: Tensor = Round.apply(values, factor, 0.0, 100.0, False)  # pyright: ignore
    assert rounded.tolist() == [0, 0, 0, 0, 45, 100, 100]
    (gradient,) = torch.autograd.grad((rounded * torch.arange(1.0, 8.0)).sum(), values)
    # Half-to-even: 0.2 and 0.3 round to 0, inside the range; -0.6 rounds to -1, outside.
    assert gradient.tolist() == [0, 0, 1.5, 2.0, 2.5, 3.0, 0]


def test_an_operator_without_a_rule_is_named(tmp_path: Path):
    nodes = [onnx.helper.make_node("Asinh", ["x"], ["y"], name="bend")]
    value = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 3]) for name in "xy"]
    path = tmp_path / "odd.onnx"
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", value[:1], value[1:])), path)
    with pytest.raises(EdgekitError, match=r"Asinh.*bend"):
        twin.open(path)
    path.write_bytes(b"not a model at all")
    with pytest.raises(EdgekitError, match="not an ONNX file"):
        twin.open(path)
