"""Sums that clip, against loops over every output."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from edgekit.twin.clipping import Clipping, excess


class Exact:
    """The exact sums of activations whose zero point has been taken off."""

    def __init__(self, weight: Tensor, window: tuple, groups: int) -> None:
        self.weight, self.window, self.groups = weight, window, groups

    def sums(self, centred: Tensor) -> Tensor:
        stride, padding, dilation = self.window
        return functional.conv2d(centred, self.weight, None, stride, padding, dilation, self.groups)


def walked(raw: Tensor, weight: Tensor, window: tuple, groups: int) -> Tensor:
    """One output after the other: raw products in the order (row, column, channel), summed by twos, each clipped."""
    (stride, padding, dilation), zero = window, 7
    raw = functional.pad(raw, (padding[1], padding[1], padding[0], padding[0]), value=zero)
    outputs, inputs, high, wide = weight.shape
    rows = (raw.shape[2] - dilation[0] * (high - 1) - 1) // stride[0] + 1
    columns = (raw.shape[3] - dilation[1] * (wide - 1) - 1) // stride[1] + 1
    made = torch.zeros(len(raw), outputs, rows, columns)
    for n, o, i, j in itertools.product(range(len(raw)), range(outputs), range(rows), range(columns)):
        first = o // (outputs // groups) * inputs
        products, correction = [], 0
        for y, x, c in itertools.product(range(high), range(wide), range(inputs)):
            value = int(raw[n, first + c, i * stride[0] + y * dilation[0], j * stride[1] + x * dilation[1]])
            products.append(value * int(weight[o, c, y, x]))
            correction += zero * int(weight[o, c, y, x])
        if len(products) % 2:
            products.append(0)
        alone = groups == outputs and inputs == 1
        sums = [a + b for a, b in zip(products[::2], products[1::2], strict=True)]
        made[n, o, i, j] = sum(s if alone else max(-32768, min(32767, s)) for s in sums) - correction
    return made


@pytest.mark.parametrize(
    ("channels", "outputs", "groups", "window"),
    [
        (3, 4, 1, ([1, 1], [1, 1], [1, 1])),
        (4, 4, 2, ([2, 1], [0, 2], [1, 2])),
        (4, 8, 4, ([1, 1], [1, 0], [1, 1])),
        (4, 4, 4, ([2, 2], [1, 1], [1, 1])),
    ],
)
def test_convolutions_clip_as_the_loops_do(channels: int, outputs: int, groups: int, window: tuple):
    draw = torch.Generator().manual_seed(channels + groups)
    raw = torch.randint(0, 256, (2, channels, 5, 6), generator=draw).float()
    weight = torch.randint(-128, 128, (outputs, channels // groups, 3, 2), generator=draw).float()
    layer = Clipping(Exact(weight, window, groups), weight, 7.0, window, groups)
    made = layer.sums(raw - 7)
    assert made.equal(walked(raw, weight, window, groups))
    assert made.equal(Exact(weight, window, groups).sums(raw - 7)) == (groups == outputs)


def test_a_matrix_product_clips_its_pairs():
    rows = torch.tensor([[127.0, 127, -128, -128, 5], [1, 2, 3, 4, 5]])
    columns = torch.tensor([[255.0, 255, 255, 255, 255]])[..., None]
    total = (rows @ columns[0, :, 0] + excess(rows, columns)[0, :, 0]).tolist()
    assert total == [32767 - 32768 + 5 * 255, 15 * 255]
