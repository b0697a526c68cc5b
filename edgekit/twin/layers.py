"""Convolutions and matrix products, over floats and over grids of integers."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from edgekit.twin.clipping import clipped
from edgekit.twin.graph import Node
from edgekit.twin.integers import EXACT, Grid, Products, Sums, Value, real

_CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_TRANSPOSED = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}


class _Linear:
    """What the integer layers share: the kind of float in which their sums are exact, and weights times a factor."""

    def __init__(self, weight: Tensor, bias: Tensor | None, span: int, outputs: int) -> None:
        largest = span * weight.abs().movedim(outputs, 0).flatten(1).sum(1).double()
        if bias is not None:
            largest = largest + bias.abs().double()
        self.kind = torch.float32 if largest.max() < EXACT else torch.float64
        self.weight, self.outputs = weight.to(self.kind), outputs
        self.bias = None if bias is None else bias.to(self.kind)
        self._scaled: tuple[Tensor, Tensor] | None = None

    def scaled(self, factor: Tensor) -> Tensor:
        """The weights whose gradient is that of sums * factor; one factor, or one per output."""
        if self._scaled is None or not torch.equal(self._scaled[0], factor):
            shape = [-1 if axis == self.outputs else 1 for axis in range(self.weight.ndim)]
            self._scaled = factor, (self.weight * factor.double().reshape(shape if factor.numel() > 1 else [])).float()
        return self._scaled[1]


class _Convolution(_Linear):
    def __init__(self, weight: Tensor, bias: Tensor | None, span: int, window: "Window", groups: int) -> None:
        super().__init__(weight, bias, span, 0)
        self.window, self.groups = window, groups

    def sums(self, centred: Tensor) -> Tensor:
        apply = _CONVOLUTIONS[centred.ndim - 2]
        stride, padding, dilation = self.window
        made = apply(centred.to(self.kind), self.weight, self.bias, stride, padding, dilation, self.groups)
        return made.float()

    def gradient(self, gradient: Tensor, centred: Tensor, factor: Tensor) -> Tensor:
        stride, padding, dilation = self.window
        weight, none = self.scaled(factor), [0] * len(stride)
        return torch.ops.aten.convolution_backward(
            gradient, centred, weight, None, stride, padding, dilation, False, none, self.groups, [True, False, False]
        )[0]


class _Product(_Linear):
    """centred @ weight, of a matrix (K, N)."""

    def __init__(self, weight: Tensor, bias: Tensor | None, span: int) -> None:
        super().__init__(weight, bias, span, 1)

    def sums(self, centred: Tensor) -> Tensor:
        return functional.linear(centred.to(self.kind), self.weight.T, self.bias).float()

    def gradient(self, gradient: Tensor, centred: Tensor, factor: Tensor) -> Tensor:
        return gradient @ self.scaled(factor).T


def prepared(node: Node, weight: Grid, make: Callable[[], Any]) -> Any:
    """The layer that `make` builds, once for the same weights."""
    if node.memo.get("weight") is not weight:
        node.memo["weight"], node.memo["layer"] = weight, make()
    return node.memo["layer"]


# Windows --------------------------------------------------------------------------------------------------------------

Window = tuple[list[int], list[int], list[int]]  # stride, padding, dilation


def listed(value: Any, count: int, default: int = 1) -> list[int]:
    return list(value) if value else [default] * count


def spatial_pads(node: Node, size: Sequence[int], kernel: Sequence[int]) -> list[tuple[int, int]]:
    """Padding before and after each spatial axis, auto_pad resolved."""
    count = len(kernel)
    mode = node.get("auto_pad", "NOTSET")
    if mode in ("NOTSET", ""):
        pads = listed(node.get("pads"), 2 * count, 0)
        return list(zip(pads[:count], pads[count:], strict=True))
    if mode == "VALID":
        return [(0, 0)] * count
    pads = []
    strides, dilations = listed(node.get("strides"), count), listed(node.get("dilations"), count)
    for length, window, stride, dilation in zip(size, kernel, strides, dilations, strict=True):
        total = max((math.ceil(length / stride) - 1) * stride + (window - 1) * dilation + 1 - length, 0)
        small, large = total // 2, total - total // 2
        pads.append((small, large) if mode == "SAME_UPPER" else (large, small))
    return pads


def padded(value: Tensor, pads: Sequence[tuple[int, int]], fill: float = 0.0) -> Tensor:
    """`value` with its last axes enlarged; negative pads crop."""
    if not any(any(pair) for pair in pads):
        return value
    return functional.pad(value, [pad for pair in reversed(pads) for pad in pair], value=fill)


def _zero(weight: Grid, ndim: int, axis: int) -> Tensor:
    """The zero point of weights, one or one per output, to be added to them."""
    zero = weight.zero.float()
    return zero.reshape([-1 if place == axis else 1 for place in range(ndim)]) if zero.numel() > 1 else zero.reshape([])


def conv(node: Node, x: Value, weight: Value, bias: Value = None) -> Value:
    fused = _fused(x, weight, bias, 0)
    a, w = (x.centred, weight.centred) if fused is not None else (real(x), real(weight))
    count = w.ndim - 2
    pads = spatial_pads(node, a.shape[2:], w.shape[2:])
    padding = [before for before, _ in pads]
    if any(before != after for before, after in pads):
        a, padding = padded(a, pads), [0] * count
    window = (listed(node.get("strides"), count), padding, listed(node.get("dilations"), count))
    groups = node.get("group", 1)
    if fused is None:
        return _CONVOLUTIONS[count](a, w, None if bias is None else real(bias), *window, groups)
    b = None if bias is None else bias.centred
    if w.requires_grad:  # integers that are trained: no layer of constant weights
        sums = _CONVOLUTIONS[count](a, w, None if b is None else b.to(w.dtype), *window, groups)
        return Sums(sums, fused.reshape(1, -1, *[1] * count) if fused.numel() > 1 else fused)
    layer = prepared(node, weight, lambda: _Convolution(w, b, x.span, window, groups))
    layer = clipped(node, layer, x, weight, w + _zero(weight, w.ndim, 0), window, groups)
    return Products(a, layer, fused.reshape(1, -1, *[1] * count) if fused.numel() > 1 else fused)


def conv_transpose(node: Node, x: Value, weight: Value, bias: Value = None) -> Tensor:
    if node.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or node.get("output_shape"):
        raise node.error("auto_pad and output_shape have no rule here")
    value, w = real(x), real(weight)
    count = w.ndim - 2
    pads = spatial_pads(node, value.shape[2:], w.shape[2:])
    stride, dilation = listed(node.get("strides"), count), listed(node.get("dilations"), count)
    extra = listed(node.get("output_padding"), count, 0)
    whole = _TRANSPOSED[count](
        value, w, None if bias is None else real(bias), stride, 0, extra, node.get("group", 1), dilation
    )
    return padded(whole, [(-before, -after) for before, after in pads])


def gemm(node: Node, x: Value, weight: Value, bias: Value = None) -> Value:
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    across = 0 if node.get("transB", 0) else 1
    fused = _fused(x, weight, bias, across) if alpha == beta == 1 else None
    if fused is not None:
        a = x.centred.T if node.get("transA", 0) else x.centred
        w = weight.centred if across else weight.centred.T
        b = None if bias is None else bias.centred.flatten()
        if w.requires_grad:
            return Sums(functional.linear(a, w.T, None if b is None else b.to(w.dtype)), fused)
        layer = prepared(node, weight, lambda: _Product(w, b, x.span))
        return Products(a, clipped(node, layer, x, weight, (w + _zero(weight, 2, 1)).T), fused)
    a = real(x).T if node.get("transA", 0) else real(x)
    w = real(weight) if across else real(weight).T
    if alpha != 1:
        a = a * alpha
    if bias is None:
        return a @ w
    b = real(bias) if beta == 1 else real(bias) * beta
    return torch.addmm(b, a, w) if b.ndim <= 1 else a @ w + b


def matmul(node: Node, x: Value, weight: Value) -> Value:
    """Of a constant matrix a layer; of two grids that the images reach, exact sums."""
    if isinstance(weight, Grid) and weight.centred.ndim == 2 and not weight.centred.requires_grad:
        fused = _fused(x, weight, None, 1)
        if fused is not None:
            layer = prepared(node, weight, lambda: _Product(weight.centred, None, x.span))
            layer = clipped(node, layer, x, weight, (weight.centred + _zero(weight, 2, 1)).T)
            return Products(x.centred, layer, fused)
    if isinstance(x, Grid) and isinstance(weight, Grid) and x.scale.numel() == weight.scale.numel() == 1:
        small = x.span * weight.span * x.centred.shape[-1] < EXACT
        a, b = (grid.centred if small else grid.centred.double() for grid in (x, weight))
        return Sums(torch.matmul(a, b).float(), x.scale * weight.scale)
    return torch.matmul(real(x), real(weight))


def einsum(node: Node, *values: Value) -> Tensor:
    return torch.einsum(node.attributes["equation"], *(real(value) for value in values))


def _fused(x: Value, weight: Value, bias: Value, across: int) -> Tensor | None:
    """The scale of the sums, scalar or (outputs,), where integer kernels compute this layer; None where floats do.

    A scale per channel must lie along the outputs, axis `across` of the weights, and the bias be on the sums' own grid.
    """
    if not (isinstance(x, Grid) and isinstance(weight, Grid)) or x.stored or weight.stored or x.scale.numel() > 1:
        return None
    if weight.scale.numel() > 1 and weight.scale.numel() != weight.centred.shape[across]:
        return None
    if weight.scale.numel() > 1 and weight.scale.ndim > 1 and weight.scale.shape[across] == 1:
        return None
    scale = (
        x.scale.reshape([]) * weight.scale.flatten()
        if weight.scale.numel() > 1
        else (x.scale * weight.scale).reshape([])
    )
    if bias is not None:
        if not isinstance(bias, Grid) or bias.centred.numel() != weight.centred.shape[across]:
            return None
        if not torch.allclose(bias.scale.flatten().float(), scale.flatten(), rtol=1e-4, atol=0):
            return None
    return scale
