"""Quantization in all its spellings: QuantizeLinear and DequantizeLinear, QLinear operators, dynamic quantization.

A QLinear operator is read as what it stands for: its inputs dequantized, the operator, its output quantized.
"""

from collections.abc import Callable
from typing import Any

import torch
from onnx import TensorProto
from torch import Tensor

from edgekit.twin import elementwise, layers, pooling
from edgekit.twin.graph import Node
from edgekit.twin.integers import Added, Averaged, Grid, Joined, Round, Softened, Sums, Target, Value, real

_RANGES: dict[int, tuple[int, int]] = {
    TensorProto.UINT8: (0, 255), TensorProto.INT8: (-128, 127), TensorProto.UINT16: (0, 65535),
    TensorProto.INT16: (-32768, 32767), TensorProto.INT32: (-(2**31), 2**31 - 1), TensorProto.UINT4: (0, 15),
    TensorProto.INT4: (-8, 7), TensorProto.UINT2: (0, 3), TensorProto.INT2: (-2, 1),
}  # fmt: skip
_KINDS: dict[torch.dtype, int] = {
    torch.uint8: TensorProto.UINT8,
    torch.int8: TensorProto.INT8,
    torch.int16: TensorProto.INT16,
}
_KINDS |= {torch.int32: TensorProto.INT32}


def quantize(node: Node, value: Value, scale: Tensor, zero: Tensor | None = None) -> Grid:
    if zero is None:
        zero = torch.zeros([], dtype=torch.int8 if _kind(node, None) == TensorProto.INT8 else torch.uint8)
    kind = _kind(node, zero)
    if kind not in _RANGES:
        raise node.error("quantizes to a type without a rule here")
    if scale.numel() > 1:
        node.attributes.setdefault("axis", 1)
        scale, zero = (_along(node, entry, real(value).ndim) for entry in (scale, zero))
    else:
        scale, zero = scale.reshape([]), zero.reshape([])
    low, high = _RANGES[kind]
    return _rounded(value, Target(scale, zero, low, high))


def _kind(node: Node, zero: Tensor | None) -> int:
    return node.get("output_dtype") or (TensorProto.UINT8 if zero is None else _KINDS[zero.dtype])


def _rounded(value: Value, target: Target) -> Grid:
    if isinstance(value, Tensor):
        made = target.grid(Round.apply(value, target.scale, *target.limits(), True))  # pyright: ignore
    else:
        made = value.on(target)
    return Grid(made.centred, made.scale, made.zero, made.span, stored=True)


def _along(node: Node, entry: Tensor, ndim: int) -> Tensor:
    axis = node.get("axis", 1) % ndim
    return entry.reshape([-1 if position == axis else 1 for position in range(ndim)])


def dequantize(node: Node, value: Value, scale: Tensor, zero: Tensor | None = None) -> Grid:
    if isinstance(value, Grid):
        if scale.numel() > 1 and scale.ndim == 1:
            scale = _along(node, scale, value.centred.ndim)
        elif scale.numel() == 1:
            scale = scale.reshape([])
        return value.read(scale, value.zero if zero is None else zero.reshape(scale.shape))
    if scale.numel() > 1 and node.opset < 13 and node.type == "DequantizeLinear":
        raise node.error(f"scales per channel need operator set 13, the file has {node.opset}")
    if zero is None:
        zero = torch.zeros_like(scale, dtype=value.dtype)
    # Integers beyond 2^24 (a bias) keep their last bits in float64.
    exact = value.double() if value.dtype == torch.int32 else value.float()
    if node.get("block_size", 0):
        axis, block = node.get("axis", 1), node.attributes["block_size"]
        scale, zero = (
            entry.repeat_interleave(block, axis).narrow(axis, 0, value.shape[axis]) for entry in (scale, zero)
        )
    elif scale.numel() > 1:
        scale, zero = (_along(node, entry, value.ndim) for entry in (scale, zero))
    else:
        scale, zero = scale.reshape([]), zero.reshape([])
    return Grid(exact - zero.to(exact.dtype), scale, zero)


# QLinear operators ----------------------------------------------------------------------------------------------------


def _target(scale: Tensor, zero: Tensor | None) -> Target:
    zero = torch.zeros([], dtype=torch.uint8) if zero is None else zero
    return Target(scale.reshape([]), zero.reshape([]), *_RANGES[_KINDS[zero.dtype]])


def _weights(node: Node, weight: Value, scale: Tensor, zero: Tensor | None, axis: int) -> Grid:
    """Constant weights, dequantized once."""
    if "weights" not in node.memo or node.memo["from"] is not weight:
        across = Node(node.type, node.name, [], [], {"axis": axis}, node.opset, node.where)
        node.memo["from"], node.memo["weights"] = weight, dequantize(across, weight, scale, zero)
    return node.memo["weights"]


def _bias(bias: Tensor | None, scale: Tensor) -> Grid | None:
    return None if bias is None else Grid(bias.double(), scale, torch.zeros([], dtype=torch.int32))


def conv(
    node: Node, x: Value, xs: Any, xz: Any, w: Value, ws: Any, wz: Any, ys: Any, yz: Any, bias: Any = None
) -> Grid:
    weight = _weights(node, w, ws, wz, 0)
    made = layers.conv(node, dequantize(node, x, xs, xz), weight, _bias(bias, xs.flatten() * ws.flatten()))
    return _rounded(made, _target(ys, yz))


def matmul(node: Node, x: Value, xs: Any, xz: Any, w: Value, ws: Any, wz: Any, ys: Any, yz: Any) -> Grid:
    weight = dequantize(node, w, ws, wz) if isinstance(w, Grid) else _weights(node, w, ws, wz, 1)
    return _rounded(layers.matmul(node, dequantize(node, x, xs, xz), weight), _target(ys, yz))


def gemm(
    node: Node, x: Value, xs: Any, xz: Any, w: Value, ws: Any, wz: Any, bias: Any = None, ys: Any = None, yz: Any = None
) -> Value:
    weight = _weights(node, w, ws, wz, 0 if node.get("transB", 0) else 1)
    made = layers.gemm(node, dequantize(node, x, xs, xz), weight, _bias(bias, xs.flatten() * ws.flatten()))
    return made.real() if ys is None else _rounded(made, _target(ys, yz))


def binary(combine: Callable[[Grid, Grid], Value]) -> Callable[..., Grid]:
    """QLinearAdd and QLinearMul."""

    def operator(node: Node, a: Value, sa: Any, za: Any, b: Value, sb: Any, zb: Any, sc: Any, zc: Any = None) -> Grid:
        return _rounded(combine(dequantize(node, a, sa, za), dequantize(node, b, sb, zb)), _target(sc, zc))

    return operator


def product(a: Grid, b: Grid) -> Sums:
    return Sums(a.centred * b.centred, a.scale * b.scale)


add, multiply = binary(Added), binary(product)


def unary(function: Callable[..., Value]) -> Callable[..., Grid]:
    """A QLinear operator of one input: ONNX Runtime computes it in floats, or in a table made with floats."""

    def operator(node: Node, x: Value, xs: Any, xz: Any, ys: Any, yz: Any = None) -> Grid:
        return _rounded(function(node, dequantize(node, x, xs, xz)), _target(ys, yz))

    return operator


def concat(node: Node, scale: Tensor, zero: Tensor, *inputs: Any) -> Grid:
    parts = [dequantize(node, *inputs[start : start + 3]) for start in range(0, len(inputs), 3)]
    return _rounded(Joined(parts, node.attributes["axis"]), _target(scale, zero))


def global_average(node: Node, x: Value, xs: Any, xz: Any, ys: Any, yz: Any) -> Grid:
    value = dequantize(node, x, xs, xz)
    if not node.get("channels_last", 0):
        return _rounded(pooling.global_average(node, value), _target(ys, yz))
    moved = value.moved(lambda centred: centred.movedim(-1, 1))
    return _rounded(pooling.global_average(node, moved), _target(ys, yz)).moved(lambda centred: centred.movedim(1, -1))


def average(node: Node, x: Value, xs: Any, xz: Any, ys: Any, yz: Any = None) -> Grid:
    value = real(dequantize(node, x, xs, xz))
    if node.get("channels_last", 0):
        made = pooling.averaged(node, value.movedim(-1, 1)).movedim(1, -1)
    else:
        made = pooling.averaged(node, value)
    return _rounded(Averaged(made), _target(ys, yz))


def softmax(node: Node, x: Value, xs: Any, xz: Any, ys: Any, yz: Any = None) -> Grid:
    made = elementwise.softmax_of(node, real(dequantize(node, x, xs, xz)), node.get("opset", node.opset), torch.softmax)
    return _rounded(Softened(made), _target(ys, yz))


# Dynamic quantization -------------------------------------------------------------------------------------------------


def dynamic(node: Node, value: Value) -> tuple[Grid, Tensor, Tensor]:
    """DynamicQuantizeLinear, sample by sample: a file that is judged at batch 1 sees the range of one sample."""
    x = real(value)
    with torch.no_grad():
        # Where the first axis is not that of the images there is one range, and Twin asks image by image.
        apart = node.memo.get("images", 1) > 1 and len(x) == node.memo["images"]
        rows = x.detach().flatten(1) if apart else x.detach().reshape(1, -1)
        low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
        scale = (high - low) / 255
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        zero = (-low / scale).round().clamp(0, 255)
        shape = [-1, *[1] * (x.ndim - 1)] if apart else []
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    rounded: Tensor = Round.apply(x, scale, -torch.inf, torch.inf, True)  # pyright: ignore
    centred = (rounded + zero).clamp(0, 255) - zero if not x.requires_grad else _hold(rounded, zero)
    return Grid(centred, scale, zero, 255, stored=True), scale, zero


def _hold(rounded: Tensor, zero: Tensor) -> Tensor:
    """The last integer of either end may be one beyond 8 bits; held there, with the gradient of its neighbours."""
    with torch.no_grad():
        excess = (rounded + zero).clamp(0, 255) - zero - rounded
    return rounded + excess


def integer_matmul(node: Node, a: Value, b: Value, za: Any = None, zb: Any = None) -> Tensor:
    """MatMulInteger: exact sums, as floats."""
    x, w = _centred(a, za, 0), _centred(b, zb, 1)
    small = 255 * 255 * x.shape[-1] < 2**24
    return torch.matmul(x, w) if small else torch.matmul(x.double(), w.double()).float()


def integer_conv(node: Node, x: Value, w: Value, zx: Any = None, zw: Any = None) -> Tensor:
    """ConvInteger: exact sums, as floats."""
    value, weight = _centred(x, zx, 0), _centred(w, zw, 0)
    small = 255 * weight.abs().flatten(1).sum(1).max() < 2**24
    return layers.conv(node, value, weight) if small else layers.conv(node, value.double(), weight.double()).float()


def _centred(value: Value, zero: Tensor | None, axis: int) -> Tensor:
    if isinstance(value, Grid):
        if zero is None:
            return value.real()
        return value.centred + (value.zero.float() - zero.float()) if value.zero is not zero else value.centred
    if zero is None:
        return value.float()
    return value.float() - (zero.reshape(-1, *[1] * (value.ndim - 1)) if zero.numel() > 1 and axis == 0 else zero)
