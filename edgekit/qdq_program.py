"""A QDQ ONNX graph -> a torch module of quantized_decomposed operators, which `torch.export` keeps as they are.

ExecuTorch and LiteRT start from torch programs: each float operator stands between a dequantize and a quantize of its
own, weights are int8 constants behind a dequantize_per_channel. It is the form that torch's PT2E quantizers write, here
with the integers, scales and zero points of edgekit's own graph.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgekit.errors import EdgekitError

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

_ENDS = {torch.int8: (-128, 127), torch.uint8: (0, 255), torch.int32: (-(2**31), 2**31 - 1)}
_BINARY: dict[str, Callable[..., Tensor]] = {
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "Div": torch.div,
    "Max": torch.maximum,
}


class Program(nn.Module):
    """images (N, C, H, W) float32 in [0, 1] -> logits (N, K): the same numbers as the QDQ graph, up to float rounding.

    Weights are int8 buffers. Quantized tensors are per tensor, with scale and zero point as plain numbers.
    """

    def __init__(
        self,
        model: "ModelProto",
        *,
        float_biases: bool = True,
        float_result: Callable[..., Tensor] = functional.linear,
    ) -> None:
        """Read an ONNX graph as edgekit writes it: constants in the file, one input, one output, no control flow.

        Args:
            float_biases: int32 biases are stored as the floats they stand for, which XNNPACK's partitioner turns back
                into the same integers; else as int32 behind a dequantize_per_channel.
            float_result: how a linear layer of int8 weights is written whose result stays float, which is that of the
                logits: (x, weight, bias or None) -> result.
        Raises:
            EdgekitError: an operator, or a form of one, that edgekit's graphs do not have.
        """
        # Its import registers the operators.
        import torch.ao.quantization.fx._decomposed  # noqa: F401
        from onnx import numpy_helper

        super().__init__()
        arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        for node in model.graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                arrays[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        self._arrays, self._float_biases = arrays, float_biases
        self._steps: list[tuple[Callable[..., Tensor], list[str], str]] = []
        # Not steps: each reader gets a dequantize of its own, else partitions of a residual network are cycles.
        self._dequantized: dict[str, tuple[Callable[..., Tensor], list[str]]] = {}
        self._buffers_of: dict[str, str] = {}
        quantized = {node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
        biases = {node.input[2] for node in model.graph.node if node.op_type in ("Conv", "Gemm") and node.input[2:]}
        for node in model.graph.node:
            if node.op_type != "Constant":
                self._take(node, node.output[0] in biases, None if node.output[0] in quantized else float_result)
        (self._input,), (self._output,) = (
            [value.name for value in values if value.name not in arrays]
            for values in (model.graph.input, model.graph.output)
        )

    def forward(self, images: Tensor) -> Tensor:
        known = {self._input: images}
        for function, inputs, output in self._steps:
            known[output] = function(*(self._value(known, name) for name in inputs))
        return self._value(known, self._output)

    def _value(self, known: dict[str, Tensor], name: str) -> Tensor:
        if name in self._dequantized:
            function, inputs = self._dequantized[name]
            return function(*(self._value(known, each) for each in inputs))
        return known[name] if name in known else getattr(self, self._buffers_of[name])

    def _constant(self, name: str, value: "numpy.ndarray | None" = None) -> str:
        """A constant of the graph as a buffer: its name as a step's input."""
        if name not in self._buffers_of:
            place = f"constant_{len(self._buffers_of)}"
            self.register_buffer(place, torch.from_numpy(numpy.array(self._arrays[name] if value is None else value)))
            self._buffers_of[name] = place
        return name

    def _step(self, function: Callable[..., Tensor], node: "NodeProto", *inputs: str) -> None:
        names = [self._constant(name) if name in self._arrays else name for name in inputs or node.input if name]
        self._steps.append((function, names, node.output[0]))

    def _take(self, node: "NodeProto", bias: bool, float_result: Callable[..., Tensor] | None) -> None:
        kind, given = node.op_type, _attributes(node)
        if kind == "QuantizeLinear":
            self._step(_quantizer(*self._grid(node)), node, node.input[0])
        elif kind == "DequantizeLinear":
            self._dequantize(node, given, bias)
        elif kind == "Conv":
            self._step(_convolution(node, given), node)
        elif kind == "Gemm":
            _check_linear(node, given)
            whole = node.input[0] in self._dequantized and node.input[1] in self._dequantized
            self._step(float_result if float_result and whole else functional.linear, node)
        elif kind == "Clip":
            low, high = (float(self._arrays[name]) if name else None for name in (*node.input[1:], "", "")[:2])
            self._step(lambda x: torch.clamp(x, low, high), node, node.input[0])
        elif kind == "Relu":
            self._step(torch.relu, node)
        elif kind == "GlobalAveragePool":
            self._step(lambda x: x.mean((2, 3), keepdim=True), node)
        elif kind == "MaxPool":
            self._step(_max_pool(node, given), node)
        elif kind == "Flatten" and given.get("axis", 1) == 1:
            self._step(lambda x: x.flatten(1), node)
        elif kind == "Reshape" and self._flattens(node):
            width = int(self._arrays[node.input[1]][1])
            self._step(lambda x: _rows(x, width, node), node, node.input[0])
        elif kind == "Max" and self._lowest(node):
            self._step(torch.positive, node, node.input[0])
        elif kind in _BINARY and len(node.input) == 2:
            self._step(_BINARY[kind], node)
        else:
            raise _unknown(node, "is not among the operators of edgekit's int8 graphs")

    def _flattens(self, node: "NodeProto") -> bool:
        """Whether the Reshape makes one row of each image."""
        shape = self._arrays.get(node.input[1])
        return shape is not None and shape.size == 2 and int(shape[0]) in (-1, 0)

    def _lowest(self, node: "NodeProto") -> bool:
        """Whether the Max changes nothing: it keeps ONNX Runtime from fusing what surrounds it."""
        return len(node.input) == 2 and bool((self._arrays.get(node.input[1]) == numpy.finfo(numpy.float32).min).all())

    def _grid(self, node: "NodeProto") -> tuple[float, int, torch.dtype]:
        """Scale, zero point and the kind of integer of a tensor that has one of each."""
        if len(node.input) < 3 or self._arrays[node.input[1]].size != 1:
            raise _unknown(node, "has no zero point, or several scales")
        scale, zero = self._arrays[node.input[1]], self._arrays[node.input[2]]
        return float(scale.reshape(())), int(zero.reshape(())), torch.from_numpy(numpy.array(zero)).dtype

    def _dequantize(self, node: "NodeProto", given: dict[str, Any], bias: bool) -> None:
        stored = self._arrays.get(node.input[0])
        if stored is None:
            self._dequantized[node.output[0]] = _dequantizer(*self._grid(node)), [node.input[0]]
            return
        scale = self._arrays[node.input[1]].reshape(-1)
        zero = numpy.broadcast_to(self._arrays[node.input[2]].reshape(-1), scale.shape)
        if bias and self._float_biases:
            name = self._constant(node.output[0], (stored * scale).astype(numpy.float32))
            self._arrays[name] = stored
            return
        axis = given.get("axis", 1) % max(stored.ndim, 1)
        # One scale for all channels is written once for each: the runtimes know one form of weights.
        scale, zero = (numpy.broadcast_to(value, stored.shape[axis : axis + 1]) for value in (scale, zero))
        scales = self._constant(f"{node.output[0]}/scales", scale.astype(numpy.float32))
        zeros = self._constant(f"{node.output[0]}/zeros", zero.astype(numpy.int64))
        kind = torch.from_numpy(numpy.array(stored)).dtype
        weights = self._constant(node.input[0])
        self._dequantized[node.output[0]] = _channel_dequantizer(axis, kind), [weights, scales, zeros]


def _attributes(node: "NodeProto") -> dict[str, Any]:
    from onnx import helper

    return {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}


def _quantizer(scale: float, zero: int, kind: torch.dtype) -> Callable[..., Tensor]:
    ends = _ENDS[kind]
    return lambda x: torch.ops.quantized_decomposed.quantize_per_tensor.default(x, scale, zero, *ends, kind)


def _dequantizer(scale: float, zero: int, kind: torch.dtype) -> Callable[..., Tensor]:
    ends = _ENDS[kind]
    return lambda x: torch.ops.quantized_decomposed.dequantize_per_tensor.default(x, scale, zero, *ends, kind)


def _channel_dequantizer(axis: int, kind: torch.dtype) -> Callable[..., Tensor]:
    ends = _ENDS[kind]
    return lambda x, scales, zeros: torch.ops.quantized_decomposed.dequantize_per_channel.default(
        x, scales, zeros, axis, *ends, kind
    )


def _window(node: "NodeProto", given: dict[str, Any]) -> tuple[list[int], list[int], list[int]]:
    """Stride, padding and dilation, of height and width."""
    pads = list(given.get("pads", [0, 0, 0, 0]))
    if given.get("auto_pad", b"NOTSET") != b"NOTSET" or len(pads) != 4 or pads[:2] != pads[2:]:
        raise _unknown(node, "pads its sides unequally, or is not of two dimensions")
    return list(given.get("strides", [1, 1])), pads[:2], list(given.get("dilations", [1, 1]))


def _convolution(node: "NodeProto", given: dict[str, Any]) -> Callable[..., Tensor]:
    stride, padding, dilation = _window(node, given)
    groups = given.get("group", 1)
    return lambda x, weight, bias=None: functional.conv2d(x, weight, bias, stride, padding, dilation, groups)


def _check_linear(node: "NodeProto", given: dict[str, Any]) -> None:
    if not given.get("transB", 0) or given.get("transA", 0) or given.get("alpha", 1) != 1 or given.get("beta", 1) != 1:
        raise _unknown(node, "is no plain linear layer")


def _max_pool(node: "NodeProto", given: dict[str, Any]) -> Callable[..., Tensor]:
    stride, padding, dilation = _window(node, given)
    kernel, ceil = list(given["kernel_shape"]), bool(given.get("ceil_mode", 0))
    return lambda x: functional.max_pool2d(x, kernel, stride, padding, dilation, ceil)


def _rows(x: Tensor, width: int, node: "NodeProto") -> Tensor:
    """(N, …) -> (N, width), where that is what the numbers of one image come to."""
    if width not in (-1, size := math.prod(x.shape[1:])):
        raise _unknown(node, f"makes rows of {width} numbers of images of {size}")
    return x.flatten(1)


def _unknown(node: "NodeProto", what: str) -> EdgekitError:
    return EdgekitError(f"{node.op_type} (node '{node.name or node.output[0]}') {what}")
