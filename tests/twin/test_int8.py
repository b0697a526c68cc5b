from fractions import Fraction
from pathlib import Path

import numpy
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
from edgekit.twin import integers
from edgekit.twin.integers import Added, Grid, Products, Round, Target
from edgekit.twin.layers import _Convolution


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


@pytest.mark.parametrize("cached", [1, 50, 2**15])
def test_a_layer_passes_no_gradient_where_its_result_was_clipped(monkeypatch, cached: int):
    """Against the plain formula: autograd through sums * factor, with the outputs outside of the grid left out."""
    monkeypatch.setattr(integers, "_CACHED", cached)
    draw = torch.Generator().manual_seed(0)
    weight = torch.randint(-40, 41, (4, 3, 3, 3), generator=draw).float()
    x = torch.randint(-60, 61, (6, 3, 5, 5), generator=draw).float().requires_grad_()
    layer = _Convolution(weight, None, 255, ([1, 1], [1, 1], [1, 1]), 1)
    scale, target = torch.tensor([0.001, 0.002, 0.004, 0.03]), Target(torch.tensor(0.1), torch.tensor(0), 0, 255)
    made = Products(x, layer, scale.reshape(1, -1, 1, 1)).on(target).centred
    share = torch.rand(made.shape, generator=draw)
    (mine,) = torch.autograd.grad((made * share).sum(), x)
    scaled = torch.nn.functional.conv2d(x, weight, padding=1) * (scale / 0.1).reshape(1, -1, 1, 1)
    inside = (scaled > -0.5) & (scaled < 255.5)
    assert 0.1 < inside.float().mean() < 0.9  # some of it clips, on both sides
    assert (scaled > 255.5).any() and (scaled < -0.5).any()
    assert made.equal(scaled.detach().round().clamp(0, 255))
    (plain,) = torch.autograd.grad((scaled * share * inside).sum(), x)
    assert mine.allclose(plain, atol=1e-4 * plain.abs().max().item())


@pytest.mark.parametrize("cached", [1, 700, 2**15])
@pytest.mark.parametrize(("low", "zeros"), [(0, (3, 120, 128)), (0, (0, 0, 0)), (-128, (-7, 5, 11))])
def test_a_sum_of_grids_is_rounded_as_exact_fractions_are(monkeypatch, cached: int, low: int, zeros: tuple):
    monkeypatch.setattr(integers, "_CACHED", cached)
    kind = torch.uint8 if low == 0 else torch.int8
    za, zb, zc = zeros
    sa, sb, sc = (torch.tensor(scale) for scale in (0.0171, 0.0123, 0.0119))
    draw = torch.Generator().manual_seed(0)
    # Channels-last, as photos are; the second is one value per channel and sample.
    a = (
        torch.randint(low, low + 256, (5, 3, 8, 9), generator=draw)
        .float()
        .contiguous(memory_format=torch.channels_last)
    )
    b = torch.randint(low, low + 256, (5, 3, 1, 1), generator=draw).float()
    x, y = (a - za).requires_grad_(), (b - zb).requires_grad_()
    grids = Grid(x, sa, torch.tensor(za, dtype=kind)), Grid(y, sb, torch.tensor(zb, dtype=kind))
    made = Added(*grids).on(Target(sc, torch.tensor(zc, dtype=kind), low, low + 255)).centred

    single = numpy.float32  # a fused multiply-add rounds once, to float32
    ra, rb = (
        Fraction(float(single(sa.item()) / single(sc.item()))),
        Fraction(float(single(sb.item()) / single(sc.item()))),
    )
    inner = Fraction(float(single(float(ra * za + Fraction(float(single(float(rb * zb))))))))
    k = Fraction(float(single(zc) - single(float(inner))))
    raw_a, raw_b = a.int().tolist(), b.int().flatten(1).tolist()
    for sample in range(5):
        for channel in range(3):
            inside = Fraction(float(single(float(rb * raw_b[sample][channel] + k))))
            for i, row in enumerate(raw_a[sample][channel]):
                for j, value in enumerate(row):
                    total = single(float(ra * value + inside))
                    expected = min(max(int(numpy.rint(total)), low), low + 255) - zc
                    assert made[sample, channel, i, j].item() == expected
    weight = torch.rand(made.shape, generator=draw)
    to_a, to_b = torch.autograd.grad((made * weight).sum(), (x, y))
    real = ((a - za) * sa + (b - zb) * sb) / sc + zc
    inside = weight * ((real > low - 0.5) & (real < low + 255.5))
    assert 0 < inside.count_nonzero() < inside.numel()
    assert to_a.allclose(inside * float(ra))
    assert to_b.allclose((inside * float(rb)).sum((2, 3), keepdim=True))


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
