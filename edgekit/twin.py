"""A model file -> a differentiable copy of that very file.

An interpreter of the ONNX graph in torch. Integer tensors are computed as ONNX Runtime computes them, in exact integer
arithmetic (held in floats) with one rounding where a kernel rounds; gradients go straight through a rounding and stop
where a value was clipped: Bengio et al. 2013 (arXiv:1308.3432), with the clipping-range mask of Choi et al. 2018
(arXiv:1805.06085), without which the attack is far weaker.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import onnx
import torch
from onnx import NodeProto, numpy_helper
from torch import Tensor, nn
from torch.nn import functional

from edgekit.errors import EdgekitError

_EXACT = 2**24  # float32 holds every integer up to here; beyond it sums are made in float64


class Twin(nn.Module):
    """images (N, C, H, W) float32 in [0, 1] -> logits (N, K) float32; a differentiable Classifier."""

    differentiable = True
    before_softmax = False  # whether a softmax that ends the file was left out

    def __init__(self, model: onnx.ModelProto, where: Path) -> None:
        super().__init__()
        self.input, self.output = model.graph.input[0].name, model.graph.output[0].name
        self.steps: list[tuple[Callable[..., Any], dict[str, Any], list[str], str]] = []
        self._constants: dict[str, str] = {}
        for tensor in model.graph.initializer:
            self._keep(tensor.name, numpy_helper.to_array(tensor))
        for node in model.graph.node:
            attributes = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
            if node.op_type == "Constant":
                self._keep(node.output[0], _constant(node, attributes, where))
                continue
            if node.op_type not in OPERATORS:
                raise EdgekitError(
                    f"no gradients through the operator {node.op_type} (node '{node.name}')", where=where
                )
            self.steps.append((OPERATORS[node.op_type], attributes, list(node.input), node.output[0]))
        last = {name: index for index, (_, _, inputs, _) in enumerate(self.steps) for name in inputs}
        self._dead = [
            [name for name, step in last.items() if step == index and name != self.output]
            for index in range(len(self.steps))
        ]
        self.eval().requires_grad_(False)

    def _keep(self, name: str, value: numpy.ndarray) -> None:
        key = f"constant_{len(self._constants)}"
        self.register_buffer(key, torch.from_numpy(numpy.array(value)))
        self._constants[name] = key

    def forward(self, images: Tensor) -> Tensor:
        values: dict[str, Any] = {name: getattr(self, key) for name, key in self._constants.items()}
        values[self.input] = images
        for (operator, attributes, inputs, output), dead in zip(self.steps, self._dead, strict=True):
            values[output] = operator(attributes, *(values[name] if name else None for name in inputs))
            for name in dead:  # what nobody reads again must not fill the memory
                values.pop(name, None)
        return _real(values[self.output])


def open(path: Path) -> Twin:
    """The differentiable copy of an ONNX file, in eval mode on the CPU.

    Raises:
        EdgekitError: the file is no ONNX graph, or it has an operator without a rule here (named).
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's parser raises several unrelated classes
        raise EdgekitError(f"not an ONNX file ({type(error).__name__})", where=path) from None
    return Twin(model, path)


def _constant(node: NodeProto, attributes: dict[str, Any], where: Path) -> numpy.ndarray:
    for key, value in attributes.items():
        if key == "value":
            return numpy_helper.to_array(value)
        if key in ("value_float", "value_floats", "value_int", "value_ints"):
            return numpy.array(value, numpy.float32 if "float" in key else numpy.int64)
    raise EdgekitError(f"the constant '{node.output[0]}' is of a kind that is not read", where=where)


# Integer tensors ------------------------------------------------------------------------------------------------------


class _Round(torch.autograd.Function):
    """clamp(round(values * factor), low, high) in one pass; the gradient is times `factor`, and 0 where clipped."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, factor: Tensor, low: float, high: float, divide: bool) -> Tensor:
        rounded = (values / factor if divide else values * factor).round_()
        ctx.mask = (rounded >= low) & (rounded <= high)
        ctx.factor, ctx.divide = factor, divide
        return rounded.clamp_(low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0] * ctx.mask
        gradient = gradient.div_(ctx.factor) if ctx.divide else gradient.mul_(ctx.factor)
        return gradient, None, None, None, None


class _RoundedSum(torch.autograd.Function):
    """clamp(round(fma(a, ra, fma(b, rb, k)))): ONNX Runtime's QLinearAdd, which rounds after adding the zero point."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, ra: Tensor, rb: Tensor, k: Tensor, low: float, high: float) -> Tensor:
        # A fused multiply-add rounds once: exact in float64, then to float32.
        inside = (b.double() * rb.double() + k.double()).float()
        rounded = (a.double() * ra.double() + inside.double()).float().round_()
        ctx.mask, ctx.ra, ctx.rb = (rounded >= low) & (rounded <= high), ra, rb
        return rounded.clamp_(low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0] * ctx.mask
        return gradient * ctx.ra, gradient * ctx.rb, None, None, None, None, None


class _Grid:
    """Integers on a grid: the real value is (integers - zero) * scale. `centred` holds integers - zero, in floats."""

    def __init__(self, centred: Tensor, scale: Tensor, zero: Tensor) -> None:
        self.centred, self.scale, self.zero = centred, scale, zero

    def real(self) -> Tensor:
        return self.centred * self.scale

    def on(self, scale: Tensor, zero: Tensor, low: float, high: float) -> "_Grid":
        if torch.equal(scale, self.scale) and torch.equal(zero, self.zero):
            return self
        return _Grid(_Round.apply(self.real(), scale, low, high, True), scale, zero)  # pyright: ignore


class _Products:
    """Exact sums of products, not rounded yet; the real value is sums * scale."""

    def __init__(self, sums: Tensor, scale: Tensor) -> None:
        self.sums, self.scale = sums, scale

    def real(self) -> Tensor:
        return self.sums * self.scale

    def on(self, scale: Tensor, zero: Tensor, low: float, high: float) -> _Grid:
        return _Grid(_Round.apply(self.sums, self.scale / scale, low, high, False), scale, zero)  # pyright: ignore


class _Sum:
    """Two grids to be added, not rounded yet."""

    def __init__(self, a: _Grid, b: _Grid) -> None:
        self.a, self.b = a, b

    def real(self) -> Tensor:
        return self.a.real() + self.b.real()

    def on(self, scale: Tensor, zero: Tensor, low: float, high: float) -> _Grid:
        ra, rb = self.a.scale / scale, self.b.scale / scale
        za, zb, zc = (value.float() for value in (self.a.zero, self.b.zero, zero))
        k = zc - (ra.double() * za.double() + (rb * zb).double()).float()
        total = _RoundedSum.apply(
            self.a.centred + za, self.b.centred + zb, ra, rb, k, low + zc.item(), high + zc.item()
        )
        return _Grid(total - zc, scale, zero)  # pyright: ignore


_LIMITS = {torch.uint8: (0, 255), torch.int8: (-128, 127), torch.int32: (-(2**31), 2**31 - 1)}


def _real(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else value.real()


def _quantize(attributes: dict[str, Any], value: Any, scale: Tensor, zero: Tensor) -> _Grid:
    low, high = (limit - int(zero) for limit in _LIMITS[zero.dtype])
    if isinstance(value, Tensor):
        return _Grid(_Round.apply(value, scale, low, high, True), scale, zero)  # pyright: ignore
    return value.on(scale, zero, low, high)


def _dequantize(attributes: dict[str, Any], value: Any, scale: Tensor, zero: Tensor) -> _Grid:
    if isinstance(value, _Grid):
        return value
    shape = [-1 if axis == attributes.get("axis", 1) else 1 for axis in range(value.ndim)] if scale.ndim else []
    # Integers beyond 2^24 (a bias) keep their last bits in float64.
    exact = value.double() if value.dtype == torch.int32 else value.float()
    return _Grid(exact - zero.float().reshape(shape), scale.reshape(shape), zero)


# Operators: (attributes, *inputs) -> output ---------------------------------------------------------------------------


def _elementwise(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    def operator(attributes: dict[str, Any], a: Any, b: Any) -> Any:
        if function is torch.add and isinstance(a, _Grid) and isinstance(b, _Grid):
            return _Sum(a, b)
        return function(_real(a), _real(b))

    return operator


def _unary(function: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    return lambda attributes, value: function(_real(value))


def _clip(attributes: dict[str, Any], value: Any, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    value = _real(value)
    # A select, not clamp: its gradient is the mask that the network itself has.
    if low is not None:
        value = torch.where(value < low, low, value)
    return value if high is None else torch.where(value > high, high, value)


def _pads(attributes: dict[str, Any], value: Tensor, fill: float = 0.0) -> tuple[Tensor, list[int]]:
    pads = attributes.get("pads", [0, 0, 0, 0])
    half = len(pads) // 2
    if pads[:half] == pads[half:]:
        return value, list(pads[:half])
    flat = [pad for axis in reversed(range(half)) for pad in (pads[axis], pads[axis + half])]
    return functional.pad(value, flat, value=fill), [0] * half


def _sums(weight: Tensor, bias: Tensor | None, work: Callable[[torch.dtype], Tensor]) -> Tensor:
    """The sums of a layer, in float32 where that is exact for any 8-bit input, else in float64."""
    largest = 255 * weight.abs().flatten(1).sum(1).double()
    if bias is not None:
        largest = largest + bias.abs().double()
    return work(torch.float32) if largest.max() < _EXACT else work(torch.float64).float()


def _conv(attributes: dict[str, Any], x: Any, weight: Any, bias: Any = None) -> Any:
    stride, dilation = attributes.get("strides", 1), attributes.get("dilations", 1)
    integral = isinstance(x, _Grid) and isinstance(weight, _Grid)
    a, w = (x.centred, weight.centred) if integral else (_real(x), _real(weight))
    b = None if bias is None else bias.centred if integral else _real(bias)
    a, padding = _pads(attributes, a)

    def work(kind: torch.dtype) -> Tensor:
        return functional.conv2d(
            a.to(kind),
            w.to(kind),
            None if b is None else b.to(kind),
            stride,
            padding,
            dilation,
            attributes.get("group", 1),
        )

    if not integral:
        return work(a.dtype)
    return _Products(_sums(w, b, work), (x.scale * weight.scale.flatten()).reshape(1, -1, 1, 1))


def _gemm(attributes: dict[str, Any], x: Any, weight: Any, bias: Any = None) -> Any:
    integral = isinstance(x, _Grid) and isinstance(weight, _Grid)
    a, w = (x.centred, weight.centred) if integral else (_real(x), _real(weight))
    b = None if bias is None else bias.centred if integral else _real(bias)
    a = a.T if attributes.get("transA", 0) else a
    w = w if attributes.get("transB", 0) else w.T
    if not integral:
        scaled = None if b is None else b * attributes.get("beta", 1.0)
        return functional.linear(a * attributes.get("alpha", 1.0), w, scaled)

    def work(kind: torch.dtype) -> Tensor:
        return functional.linear(a.to(kind), w.to(kind), None if b is None else b.to(kind))

    return _Products(_sums(w, b, work), x.scale * weight.scale.flatten())


def _global_average(attributes: dict[str, Any], value: Any) -> Any:
    if isinstance(value, _Grid):
        count = value.centred[0, 0].numel()
        # ONNX Runtime divides the output's scale by the area, so the mean is one more factor of the requantization.
        return _Mean(value.centred.sum((2, 3), keepdim=True), value.scale, count)
    return _real(value).mean((2, 3), keepdim=True)


class _Mean(_Products):
    """A sum over an area of `count` places whose mean is not rounded yet."""

    def __init__(self, sums: Tensor, scale: Tensor, count: int) -> None:
        super().__init__(sums, scale)
        self.count = count

    def real(self) -> Tensor:
        return self.sums * (self.scale / self.count)

    def on(self, scale: Tensor, zero: Tensor, low: float, high: float) -> _Grid:
        return _Grid(_Round.apply(self.sums, self.scale / (scale * self.count), low, high, False), scale, zero)  # pyright: ignore


def _mean(attributes: dict[str, Any], value: Any, axes: Tensor | None = None) -> Tensor:
    chosen = axes.tolist() if axes is not None else attributes.get("axes")
    return _real(value).mean(chosen, keepdim=bool(attributes.get("keepdims", 1)))


def _moved(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """An operator that only moves values: integers stay integers on their grid."""

    def operator(attributes: dict[str, Any], value: Any, *others: Any) -> Any:
        if isinstance(value, _Grid):
            return _Grid(function(attributes, value.centred, *others), value.scale, value.zero)
        return function(attributes, _real(value), *others)

    return operator


def _flatten(attributes: dict[str, Any], value: Tensor) -> Tensor:
    axis = attributes.get("axis", 1) % (value.ndim + 1)
    return value.reshape(int(numpy.prod(value.shape[:axis])), -1)


def _reshape(attributes: dict[str, Any], value: Tensor, shape: Tensor) -> Tensor:
    wanted = [value.shape[axis] if size == 0 else size for axis, size in enumerate(shape.tolist())]
    return value.reshape(wanted)


def _max_pool(attributes: dict[str, Any], value: Tensor) -> Tensor:
    value, padding = _pads(attributes, value, -torch.inf)
    return functional.max_pool2d(value, attributes["kernel_shape"], attributes.get("strides", 1), padding)


def _normalize(
    attributes: dict[str, Any], value: Any, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor
) -> Tensor:
    return functional.batch_norm(_real(value), mean, variance, scale, bias, eps=attributes.get("epsilon", 1e-5))


OPERATORS: dict[str, Callable[..., Any]] = {
    "Add": _elementwise(torch.add),
    "BatchNormalization": _normalize,
    "Clip": _clip,
    "Conv": _conv,
    "DequantizeLinear": _dequantize,
    "Div": _elementwise(torch.div),
    "Flatten": _moved(_flatten),
    "Gemm": _gemm,
    "GlobalAveragePool": _global_average,
    "Identity": lambda attributes, value: value,
    "MaxPool": _moved(_max_pool),
    "Mul": _elementwise(torch.mul),
    "QuantizeLinear": _quantize,
    "ReduceMean": _mean,
    "Relu": _unary(torch.relu),
    "Reshape": _moved(_reshape),
    "Sub": _elementwise(torch.sub),
}
