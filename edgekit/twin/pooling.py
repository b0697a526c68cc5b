"""Pooling over windows and over whole maps."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from edgekit.twin.graph import Node
from edgekit.twin.integers import Averaged, Grid, Sums, Value, real
from edgekit.twin.layers import listed, padded, spatial_pads

_MAXIMA = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}
_MEANS = {2: functional.avg_pool2d, 3: functional.avg_pool3d}


def _extended(
    node: Node, value: Tensor, kernel: list[int], strides: list[int], dilations: list[int]
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Padding as the file says it, and with what ceil_mode adds behind so that the last window has its place."""
    pads = spatial_pads(node, value.shape[2:], kernel)
    if not node.get("ceil_mode", 0):
        return pads, pads
    more = []
    for length, (before, after), window, stride, dilation in zip(
        value.shape[2:], pads, kernel, strides, dilations, strict=True
    ):
        reach = dilation * (window - 1) + 1
        count = math.ceil((length + before + after - reach) / stride) + 1
        if (count - 1) * stride >= length + before:  # a window that would begin behind the image is left out
            count -= 1
        more.append((before, max(after, (count - 1) * stride + reach - length - before)))
    return pads, more


def max_pool(node: Node, value: Tensor) -> Tensor:
    kernel = node.attributes["kernel_shape"]
    count = len(kernel)
    strides, dilations = listed(node.get("strides"), count), listed(node.get("dilations"), count)
    _, pads = _extended(node, value, kernel, strides, dilations)
    padding = [before for before, _ in pads]
    if any(before != after or before > window // 2 for (before, after), window in zip(pads, kernel, strict=True)):
        value, padding = padded(value, pads, -torch.inf), [0] * count
    return _MAXIMA[count](value, kernel, strides, padding, dilations)


def average_pool(node: Node, value: Value) -> Value:
    made = averaged(node, real(value))
    fused = isinstance(value, Grid) and not value.stored and node.get("fused", False)
    return Averaged(made, node.get("unsigned", False)) if fused else made


def averaged(node: Node, x: Tensor) -> Tensor:
    kernel = node.attributes["kernel_shape"]
    count = len(kernel)
    if any(dilation != 1 for dilation in listed(node.get("dilations"), count)):
        raise node.error("dilated averages have no rule here")
    strides = listed(node.get("strides"), count)
    pads, extended = _extended(node, x, kernel, strides, [1] * count)
    if not any(any(pair) for pair in extended):
        return _sums(x, kernel, strides) / math.prod(kernel)
    # What is averaged over differs from window to window: the sum of values over the sum of what counts.
    counted = torch.ones(1, 1, *x.shape[2:], device=x.device)
    if node.get("count_include_pad", 0):
        counted = padded(counted, pads, 1.0)
        extended_count = [
            (before - inner_before, after - inner_after)
            for (before, after), (inner_before, inner_after) in zip(extended, pads, strict=True)
        ]
    else:
        extended_count = extended
    counts = _sums(padded(counted, extended_count), kernel, strides)
    return _sums(padded(x, extended), kernel, strides) / counts


def _sums(x: Tensor, kernel: list[int], strides: list[int]) -> Tensor:
    """Sums over windows, value after value and divided by nothing: a mean of integers is often halfway between two."""
    if len(kernel) == 1:
        return _sums(x.unsqueeze(2), [1, *kernel], [1, *strides]).squeeze(2)
    return _MEANS[len(kernel)](x, kernel, strides, divisor_override=1)


def global_average(node: Node, value: Value) -> Value:
    if isinstance(value, Grid) and not value.stored and value.scale.numel() == 1:
        axes = tuple(range(2, value.centred.ndim))
        count = math.prod(value.centred.shape[2:])
        return Sums(value.centred.sum(axes, keepdim=True), value.scale, count)
    x = real(value)
    return x.mean(tuple(range(2, x.ndim)), keepdim=True)


def global_max(node: Node, value: Tensor) -> Tensor:
    return value.amax(tuple(range(2, value.ndim)), keepdim=True)
