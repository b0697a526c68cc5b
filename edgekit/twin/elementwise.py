"""Operators on each value by itself, reductions, and the activations of every exporter."""

import math
from collections.abc import Callable
from typing import Any

import torch
from onnx import TensorProto
from torch import Tensor
from torch.nn import functional

from edgekit.twin.graph import Node
from edgekit.twin.integers import Added, Bounded, Grid, Softened, Sums, Value, bounded, real

_TYPES = {
    TensorProto.INT64: torch.int64, TensorProto.INT32: torch.int32, TensorProto.BOOL: torch.bool,
    TensorProto.INT8: torch.int8, TensorProto.UINT8: torch.uint8, TensorProto.INT16: torch.int16,
}  # fmt: skip
# Half and double precision are computed in float32: their gradients are the same to the last bits.
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)


def add(node: Node, a: Value, b: Value) -> Value:
    return Added(a, b) if _scalar_grids(a, b) else together(torch.add, a, b)


def multiply(node: Node, a: Value, b: Value) -> Value:
    if _scalar_grids(a, b):
        return Sums(a.centred * b.centred, a.scale * b.scale)
    return together(torch.mul, a, b)


def _scalar_grids(a: Value, b: Value) -> bool:
    grids = isinstance(a, Grid) and isinstance(b, Grid) and not (a.stored or b.stored)
    return grids and a.scale.numel() == b.scale.numel() == 1


def together(function: Callable[..., Tensor], *values: Value) -> Tensor:
    """`function` of tensors that may lie on different devices: results of shape arithmetic stay on the CPU."""
    tensors = [real(value) for value in values]
    device = next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), None)
    return function(*tensors) if device is None else function(*(tensor.to(device) for tensor in tensors))


def binary(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda node, *values: together(function, *values)


def unary(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda node, value: function(real(value))


def variadic(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def operator(node: Node, first: Value, *others: Value) -> Tensor:
        made = real(first)
        for other in others:
            made = together(function, made, other)
        return made

    return operator


def mean_of(node: Node, *values: Value) -> Tensor:
    return variadic(torch.add)(node, *values) / len(values)


def divide(node: Node, a: Value, b: Value) -> Tensor:
    x, y = real(a), real(b)
    if x.is_floating_point() or y.is_floating_point():
        return together(torch.div, x, y)
    return together(lambda p, q: torch.div(p, q, rounding_mode="trunc"), x, y)


def power(node: Node, a: Value, b: Value) -> Tensor:
    x, y = real(a), real(b)
    if y.numel() == 1:  # a number, so that autograd takes no logarithm of the base
        return x.pow(y.item()).reshape(torch.broadcast_shapes(x.shape, y.shape)).to(x.dtype)
    return together(torch.pow, x, y)


def modulo(node: Node, a: Value, b: Value) -> Tensor:
    return together(torch.fmod if node.get("fmod", 0) else torch.remainder, a, b)


def where(node: Node, condition: Tensor, a: Value, b: Value) -> Tensor:
    return together(torch.where, condition, a, b)


def cast(node: Node, value: Value) -> Value:
    kind = node.attributes["to"]
    if kind in _FLOATS:
        return real(value).float()
    if kind not in _TYPES:
        raise node.error(f"casts to {TensorProto.DataType.Name(kind)}, for which there is no rule here")
    made = real(value)
    # Sums of integers are held in floats, and so stay differentiable where a file casts them.
    if made.requires_grad and kind == TensorProto.INT32:
        return made + (made.trunc() - made).detach()
    return made.to(_TYPES[kind])


# Activations ----------------------------------------------------------------------------------------------------------


def relu(node: Node, value: Value) -> Value:
    return bounded(value, 0.0, math.inf) if isinstance(value, Tensor) else Bounded(value, 0.0, math.inf)


def clip(node: Node, value: Value, low: Value = None, high: Value = None) -> Value:
    """Bounds as attributes (before operator set 11) or as inputs, either of them left out."""
    least = node.get("min", -math.inf) if low is None else float(real(low))
    most = node.get("max", math.inf) if high is None else float(real(high))
    return bounded(value, least, most) if isinstance(value, Tensor) else Bounded(value, least, most)


def leaky_relu(node: Node, value: Value) -> Tensor:
    return functional.leaky_relu(real(value), node.get("alpha", 0.01))


def prelu(node: Node, value: Value, slope: Value) -> Tensor:
    x = real(value)
    return together(torch.where, x < 0, x * real(slope), x)


def elu(node: Node, value: Tensor) -> Tensor:
    return functional.elu(value, node.get("alpha", 1.0))


def celu(node: Node, value: Tensor) -> Tensor:
    return functional.celu(value, node.get("alpha", 1.0))


def selu(node: Node, value: Tensor) -> Tensor:
    alpha, gamma = node.get("alpha", 1.6732632423543772), node.get("gamma", 1.0507009873554805)
    return gamma * functional.elu(value, alpha)


def hard_sigmoid(node: Node, value: Tensor) -> Tensor:
    return (node.get("alpha", 0.2) * value + node.get("beta", 0.5)).clamp(0, 1)


def gelu(node: Node, value: Tensor) -> Tensor:
    return functional.gelu(value, approximate=node.get("approximate", "none"))


def quick_gelu(node: Node, value: Tensor) -> Tensor:
    return value * (node.get("alpha", 1.702) * value).sigmoid()


def swish(node: Node, value: Tensor) -> Tensor:
    return value * (node.get("alpha", 1.0) * value).sigmoid()


def thresholded_relu(node: Node, value: Tensor) -> Tensor:
    return torch.where(value > node.get("alpha", 1.0), value, torch.zeros_like(value))


def shrink(node: Node, value: Tensor) -> Tensor:
    bias, threshold = node.get("bias", 0.0), node.get("lambd", 0.5)
    outside = torch.where(value < -threshold, value + bias, torch.zeros_like(value))
    return torch.where(value > threshold, value - bias, outside)


def softmax(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Softmax or LogSoftmax."""

    def operator(node: Node, value: Value) -> Value:
        made = softmax_of(node, real(value), node.opset, function)
        return Softened(made) if function is torch.softmax and isinstance(value, Grid) and not value.stored else made

    return operator


def softmax_of(node: Node, value: Tensor, opset: int, function: Callable[..., Tensor]) -> Tensor:
    if opset >= 13:
        return function(value, node.get("axis", -1))
    axis = node.get("axis", 1) % value.ndim  # over all axes from this one on
    return function(value.flatten(axis), -1).reshape(value.shape)


# Reductions -----------------------------------------------------------------------------------------------------------


def _prod(value: Tensor, axes: list[int], keepdim: bool) -> Tensor:
    for axis in sorted((axis % value.ndim for axis in axes), reverse=True):
        value = value.prod(axis, keepdim=keepdim)
    return value


def _mean(value: Tensor, axes: list[int], keepdim: bool) -> Tensor:
    return value.mean(axes, keepdim=keepdim)


REDUCTIONS: dict[str, Callable[..., Tensor]] = {
    "ReduceL1": lambda value, axes, keep: value.abs().sum(axes, keepdim=keep),
    "ReduceL2": lambda value, axes, keep: torch.linalg.vector_norm(value, dim=axes, keepdim=keep),
    "ReduceLogSum": lambda value, axes, keep: value.sum(axes, keepdim=keep).log(),
    "ReduceLogSumExp": lambda value, axes, keep: value.logsumexp(axes, keepdim=keep),
    "ReduceMax": lambda value, axes, keep: value.amax(axes, keepdim=keep),
    "ReduceMean": _mean,
    "ReduceMin": lambda value, axes, keep: value.amin(axes, keepdim=keep),
    "ReduceProd": _prod,
    "ReduceSum": lambda value, axes, keep: value.sum(axes, keepdim=keep),
    "ReduceSumSquare": lambda value, axes, keep: value.square().sum(axes, keepdim=keep),
}


def reduction(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def operator(node: Node, value: Value, axes: Any = None) -> Tensor:
        x = real(value)
        chosen = axes.tolist() if axes is not None else node.get("axes")
        if not chosen:
            if node.get("noop_with_empty_axes", 0):
                return function(x.unsqueeze(0), [0], False)  # each value by itself: L1 is its magnitude, a sum itself
            chosen = list(range(x.ndim))
        return function(x, list(chosen), bool(node.get("keepdims", 1)))

    return operator
