"""An ONNX graph -> the text of ncnn's .param and the bytes of its .bin.

What the files hold is fixed by ncnn's own loader: https://github.com/Tencent/ncnn/wiki/param-and-model-file-structure,
and the numbers of each layer's parameters by https://github.com/Tencent/ncnn/wiki/operation-param-weight-table. Of an
integer layer the .bin has int8 weights, their scales, that of the input and, where every reader works on integers, that
of the result, which ncnn then rounds in the same kernel. A scale of ncnn is what numbers are multiplied by: 1 / ONNX's.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import onnx
from onnx import ModelProto, NodeProto, helper, numpy_helper

from edgekit.errors import EdgekitError

MAGIC = "7767517"
INT8_TERM = 8  # the number of the parameter that is there where a layer works on integers
_BINARY = {"Add": 0, "Sub": 1, "Mul": 2, "Div": 3}
_SIMPLE: dict[str, tuple[str, dict[int, Any]]] = {
    "Relu": ("ReLU", {}),
    "Sigmoid": ("Sigmoid", {}),
    "Tanh": ("TanH", {}),
    "HardSwish": ("HardSwish", {0: 1 / 6, 1: 0.5}),
}
_SAME = ("Identity", "Dropout")  # of one input: what they answer is what they get
# What .bin says of the numbers that follow; float32 numbers that are never stored otherwise stand without it.
_PLAIN, _HALF, _INT8 = 0, 0x01306B47, 0x000D4B38
_NAME = re.compile(r"[A-Za-z0-9_.]{1,200}")  # ncnn reads up to 255 letters; those with a colon are made here


@dataclass
class Layer:
    """One line of .param and its part of .bin."""

    type: str
    name: str
    bottoms: list[str]
    tops: list[str]
    params: dict[int, Any] = field(default_factory=dict)
    data: bytes = b""

    def line(self) -> str:
        parts = [f"{self.type:<24}", f"{self.name:<24}", str(len(self.bottoms)), str(len(self.tops))]
        return " ".join([*parts, *self.bottoms, *self.tops, *(_entry(*each) for each in self.params.items())])


@dataclass(frozen=True)
class Integers:
    """A constant of the graph that is stored as integers: `values` * `scale`, one or one per output channel."""

    values: numpy.ndarray
    scale: numpy.ndarray

    def real(self) -> numpy.ndarray:
        shape = (-1, *[1] * (self.values.ndim - 1)) if self.scale.size > 1 else ()
        return self.values.astype(numpy.float32) * self.scale.reshape(shape)


def lower(model: ModelProto, *, half: bool = False) -> tuple[str, bytes]:
    """The text of .param and the bytes of .bin.

    Args:
        model: one input (N, C, H, W), one output; a QDQ graph's integers are read by Conv and Gemm alone.
        half: store the weights in 16 bits.
    Raises:
        EdgekitError: the graph has an operator, or a form of one, that is not written; it is named.
    """
    layers = _split(_Lowering(model, half).layers)
    blobs = sum(len(layer.tops) for layer in layers)
    lines = [MAGIC, f"{len(layers)} {blobs}", *(layer.line() for layer in layers)]
    return "\n".join(lines) + "\n", b"".join(layer.data for layer in layers)


class _Lowering:
    def __init__(self, model: ModelProto, half: bool) -> None:
        self.half, self.layers = half, list[Layer]()
        graph = model.graph
        self.constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        self.integers: dict[str, Integers] = {}
        self.names: dict[str, str] = {}  # of ncnn's blobs, by what ONNX calls them
        self.rounded: dict[str, tuple[str, numpy.float32]] = {}  # quantized tensors: which float one, and its scale
        self.stored: set[str] = set()  # those whose blob holds integers
        self.done: set[str] = set()  # results of nodes that went into the layer before them
        nodes = [node for node in graph.node if not self._constant(node)]
        self.readers: dict[str, list[NodeProto]] = {}
        for node in nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.outputs = {value.name for value in graph.output}
        if len(graph.input) != 1 or len(graph.output) != 1:
            raise _refused("a graph with one input and one output is what is written to .param")
        self._input(graph.input[0])
        for node in nodes:
            if node.output[0] not in self.done:
                choose = WRITERS.get(node.op_type)
                if choose is None:
                    raise _refused(f"the operator {node.op_type} is not written to .param")
                choose(self, node)

    def _constant(self, node: NodeProto) -> bool:
        """Whether the node is known before any image is; then it is a constant from here on."""
        if node.op_type == "Constant":
            (entry,) = node.attribute
            if entry.name != "value":
                raise _refused(f"a Constant with the attribute {entry.name} is not written to .param")
            self.constants[node.output[0]] = numpy_helper.to_array(entry.t)
            return True
        if node.op_type == "DequantizeLinear" and node.input[0] in self.constants:
            values, scale = (self.constants[name] for name in node.input[:2])
            if len(node.input) > 2 and self.constants[node.input[2]].any():
                raise _refused(f"{node.input[0]} has a zero point, which ncnn has not")
            if scale.size > 1 and attributes(node).get("axis", 1) != 0:
                raise _refused(f"{node.input[0]} has scales along another axis than its outputs")
            self.integers[node.output[0]] = Integers(values, scale.astype(numpy.float32).reshape(-1))
            return True
        return False

    def _input(self, value: onnx.ValueInfoProto) -> None:
        sizes = [size.dim_value for size in value.type.tensor_type.shape.dim]
        if len(sizes) != 4 or not all(sizes[1:]):
            raise _refused("an input (N, C, H, W) of known size is what is written to .param")
        _, channels, height, width = sizes
        self.add("Input", value.name, [], value.name, {0: width, 1: height, 2: channels})

    # What the rules below are written with ----------------------------------------------------------------------------

    def blob(self, name: str) -> str:
        """What ncnn calls the computed tensor `name`."""
        if name in self.rounded:
            raise _refused(f"{name} is rounded for an operator that is no layer: ncnn has floats there")
        return self.names[name]

    def add(
        self, type: str, name: str, bottoms: Sequence[str], top: str, params: Mapping[int, Any], data: bytes = b""
    ) -> None:
        """One more layer, whose result ONNX calls `top`."""
        taken = self.names.values()
        plain = _NAME.fullmatch(top) and top not in taken
        self.names[top] = top if plain else f"blob:{len(self.layers)}"
        label = name if _NAME.fullmatch(name) else f"layer:{len(self.layers)}"
        self.layers.append(Layer(type, label, list(bottoms), [self.names[top]], dict(params), data))

    def only_reader(self, name: str) -> NodeProto | None:
        readers = self.readers.get(name, [])
        return readers[0] if len(readers) == 1 and name not in self.outputs else None

    def value(self, name: str) -> numpy.ndarray | None:
        """A constant in float32; None where it is computed."""
        if name in self.integers:
            return self.integers[name].real()
        return self.constants[name].astype(numpy.float32) if name in self.constants else None

    def weights(self, value: numpy.ndarray, name: str) -> bytes:
        """Weights as .bin has them, with what they are stored as before them."""
        if value.dtype == numpy.int8:
            return _flagged(_INT8, value.tobytes())
        if not self.half:
            return _flagged(_PLAIN, _floats(value))
        with numpy.errstate(over="ignore"):
            halves = value.astype("<f2")
        if not numpy.isfinite(halves).all():
            raise _refused(f"{name} has weights too large for 16 bits")
        return _flagged(_HALF, halves.tobytes())

    def clipped(self, result: str) -> tuple[str, dict[int, Any]]:
        """The activation that alone reads `result` becomes part of the layer: the name of its result, and how."""
        reader = self.only_reader(result)
        if reader is None or reader.input[0] != result:
            return result, {}
        if reader.op_type == "Relu":
            params: dict[int, Any] = {9: 1}
        elif reader.op_type == "Clip":
            params = {9: 3, 10: list(self.bounds(reader))}
        else:
            return result, {}
        self.done.add(reader.output[0])
        return reader.output[0], params

    def bounds(self, node: NodeProto) -> tuple[float, float]:
        """Of a Clip."""
        ends = [float(numpy.finfo(numpy.float32).min), float(numpy.finfo(numpy.float32).max)]
        for place, name in enumerate(node.input[1:3]):
            if name:
                value = self.value(name)
                if value is None:
                    raise _refused(f"the bounds of {node.output[0]} are computed")
                ends[place] = float(value)
        return ends[0], ends[1]

    def layer(self, node: NodeProto, type: str, params: dict[int, Any]) -> None:
        """A convolution or a matrix product, on integers where its input and weights are such."""
        given, weight = node.input[:2]
        result, activation = self.clipped(node.output[0])
        stored, grid = self.integers.get(weight), self.rounded.get(given)
        whole = stored is not None and grid is not None and stored.values.dtype == numpy.int8
        values = stored.values if stored is not None and whole else self.value(weight)
        if values is None:
            raise _refused(f"the weights of {node.output[0]} are computed")
        bias = self.value(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        if len(node.input) > 2 and node.input[2] and bias is None:
            raise _refused(f"the bias of {node.output[0]} is computed")
        data = self.weights(values, weight) + (b"" if bias is None else _floats(bias))
        more: dict[int, Any] = {}
        if stored is not None and grid is not None and whole:
            source, scale = grid
            scales = numpy.broadcast_to(stored.scale, len(values))
            data += _floats(1 / scales) + _floats(1 / scale)
            more[INT8_TERM] = 1
            after = self._rounding(result) if type != "InnerProduct" else None
            if after is not None:
                more[INT8_TERM], data = 101, data + _floats(1 / after)
                self.stored.add(result)
            # Integers that are there already, of the layer before or of a Quantize, else floats that ncnn rounds.
            bottom = self.names.get(given) or self.names[source]
        else:
            bottom = self.blob(given)
        self.add(type, node.output[0], [bottom], result, params | more | activation, data)

    def _rounding(self, result: str) -> numpy.float32 | None:
        """The scale that every reader of `result` has it rounded by; None where one reads it as it is."""
        readers = self.readers.get(result, [])
        if result in self.outputs or not readers or any(one.op_type != "QuantizeLinear" for one in readers):
            return None
        scales = {self.constants[one.input[1]].item() for one in readers}
        return numpy.float32(scales.pop()) if len(scales) == 1 else None


# One rule for each operator -------------------------------------------------------------------------------------------


def _conv(graph: _Lowering, node: NodeProto) -> None:
    entries = attributes(node)
    shape = _shape(graph, node)
    if len(shape) != 4:
        raise _refused(f"{node.output[0]} is a Conv of {len(shape) - 2} dimensions, not of 2")
    group, outputs = entries.get("group", 1), shape[0]
    (high, wide), (tall, far) = entries.get("strides", [1, 1]), entries.get("dilations", [1, 1])
    top, left, bottom, right = _pads(node)
    params = {0: outputs, 1: shape[3], 11: shape[2], 2: far, 12: tall, 3: wide, 13: high}
    params |= {4: left, 14: top, 15: right, 16: bottom, 5: int(len(node.input) > 2), 6: int(numpy.prod(shape))}
    if group == 1:
        graph.layer(node, "Convolution", params)
        return
    if node.input[1] in graph.integers and group != outputs:
        raise _refused(f"{node.output[0]} has {group} groups for {outputs} channels: ncnn has one scale for a group")
    graph.layer(node, "ConvolutionDepthWise", params | {7: group})


def _gemm(graph: _Lowering, node: NodeProto) -> None:
    entries = attributes(node)
    if entries.get("alpha", 1) != 1 or entries.get("beta", 1) != 1 or entries.get("transA", 0):
        raise _refused(f"{node.output[0]} is a Gemm that multiplies by more than its weights")
    if not entries.get("transB", 0):
        if node.input[1] in graph.integers:
            raise _refused(f"{node.output[0]} has integer weights that are not transposed")
        turned = graph.value(node.input[1])
        if turned is None:
            raise _refused(f"the weights of {node.output[0]} are computed")
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.input[1] = f"{node.input[1]}.T"
        graph.constants[copy.input[1]] = turned.T
        node = copy
    outputs, inputs = _shape(graph, node)
    graph.layer(node, "InnerProduct", {0: outputs, 1: int(len(node.input) > 2), 2: outputs * inputs})


def _binary(graph: _Lowering, node: NodeProto) -> None:
    bottoms = [graph.blob(name) if graph.value(name) is None else _memory(graph, name) for name in node.input]
    graph.add("BinaryOp", node.output[0], bottoms, node.output[0], {0: _BINARY[node.op_type]})


def _memory(graph: _Lowering, name: str) -> str:
    """A constant as a blob: a number, or one for each channel."""
    value = graph.value(name)
    channels = value is not None and value.ndim > 2 and value.size == value.shape[-3]
    if value is None or not (value.size == 1 or channels):
        raise _refused(f"the constant {name} is neither a number nor one for each channel")
    shape = {0: 1} if value.size == 1 else {0: 1, 1: 1, 2: value.size}
    graph.add("MemoryData", name, [], f"{name}\0{len(graph.layers)}", shape, _floats(value))
    return graph.layers[-1].tops[0]


def _simple(graph: _Lowering, node: NodeProto) -> None:
    type, params = _SIMPLE[node.op_type]
    graph.add(type, node.output[0], [graph.blob(node.input[0])], node.output[0], params)


def _clip(graph: _Lowering, node: NodeProto) -> None:
    low, high = graph.bounds(node)
    graph.add("Clip", node.output[0], [graph.blob(node.input[0])], node.output[0], {0: low, 1: high})


def _maximum(graph: _Lowering, node: NodeProto) -> None:
    """Max with the lowest number, which changes nothing: qdq.py keeps runtimes from fusing with it."""
    lowest = graph.value(node.input[1]) if len(node.input) == 2 else None
    if lowest is None or (lowest > numpy.finfo(numpy.float32).min).any():
        raise _refused("the operator Max is not written to .param")
    _same(graph, node)


def _same(graph: _Lowering, node: NodeProto) -> None:
    graph.names[node.output[0]] = graph.blob(node.input[0])


def _normalize(graph: _Lowering, node: NodeProto) -> None:
    values = [graph.value(name) for name in node.input[1:5]]
    slope, bias, mean, variance = values
    if slope is None or bias is None or mean is None or variance is None:
        raise _refused(f"the statistics of {node.output[0]} are computed")
    params = {0: slope.size, 1: attributes(node).get("epsilon", 1e-5)}
    data = b"".join(map(_floats, (slope, mean, variance, bias)))
    graph.add("BatchNorm", node.output[0], [graph.blob(node.input[0])], node.output[0], params, data)


def _pool(graph: _Lowering, node: NodeProto) -> None:
    entries = attributes(node)
    if (
        len(entries["kernel_shape"]) != 2
        or len(node.output) > 1
        or any(one != 1 for one in entries.get("dilations", []))
    ):
        raise _refused(f"{node.output[0]} is a {node.op_type} of a form that is not written to .param")
    (height, width), (high, wide) = entries["kernel_shape"], entries.get("strides", [1, 1])
    top, left, bottom, right = _pads(node)
    if entries.get("ceil_mode", 0) and (top, left, bottom, right) != (0, 0, 0, 0):
        # ONNX leaves out a window that begins in the padding; ncnn has it.
        raise _refused(f"{node.output[0]} is a {node.op_type} that rounds its padded size up, which is not written")
    # 5: the last window is left out where it would not be whole, or, as ONNX's ceil_mode, it is not.
    params = {0: int(node.op_type == "AveragePool"), 1: width, 11: height, 2: wide, 12: high}
    params |= {3: left, 13: top, 14: right, 15: bottom, 5: 0 if entries.get("ceil_mode", 0) else 1}
    params |= {6: entries.get("count_include_pad", 0)}
    graph.add("Pooling", node.output[0], [graph.blob(node.input[0])], node.output[0], params)


def _mean(graph: _Lowering, node: NodeProto) -> None:
    """Over height and width. ncnn answers a vector; where ONNX keeps the dimensions so does a Reshape."""
    entries, keeps = attributes(node), True
    if node.op_type == "ReduceMean":
        axes = entries.get("axes")
        if len(node.input) > 1 and (given := graph.value(node.input[1])) is not None:
            axes = given.tolist()
        keeps = bool(entries.get("keepdims", 1))
        if axes is None or sorted(axes) not in ([2, 3], [-2, -1]):
            raise _refused(f"{node.output[0]} is a mean over other axes than height and width")
    result, reader = node.output[0], graph.only_reader(node.output[0])
    if keeps and reader is not None and reader.op_type == "Flatten" and attributes(reader).get("axis", 1) == 1:
        result, keeps = reader.output[0], False
        graph.done.add(result)
    pooled = f"{result}\0" if keeps else result  # a name that no graph has
    graph.add("Pooling", node.output[0], [graph.blob(node.input[0])], pooled, {0: 1, 4: 1})
    if keeps:
        graph.add("Reshape", f"{result}.kept", [graph.names[pooled]], result, {0: 1, 1: 1, 2: -1})


def _flatten(graph: _Lowering, node: NodeProto) -> None:
    if node.op_type == "Flatten":
        plain = attributes(node).get("axis", 1) == 1
    else:
        shape = graph.value(node.input[1])
        plain = shape is not None and shape.size == 2 and shape[0] in (0, -1, 1)
    if not plain:
        raise _refused(f"{node.output[0]} is a {node.op_type} to another shape than (N, K)")
    graph.add("Flatten", node.output[0], [graph.blob(node.input[0])], node.output[0], {})


def _concat(graph: _Lowering, node: NodeProto) -> None:
    if attributes(node)["axis"] != 1:
        raise _refused(f"{node.output[0]} is a Concat of another axis than the channels")
    graph.add("Concat", node.output[0], [graph.blob(name) for name in node.input], node.output[0], {0: 0})


def _quantize(graph: _Lowering, node: NodeProto) -> None:
    source, scale = node.input[0], graph.constants[node.input[1]]
    zero = graph.constants[node.input[2]] if len(node.input) > 2 else numpy.uint8(0)
    if zero.dtype != numpy.int8 or zero.any() or scale.size != 1:
        raise _refused(f"{source} is rounded with a zero point, or unsigned, which ncnn does not")
    back = graph.readers.get(node.output[0], [])
    if any(one.op_type != "DequantizeLinear" or one.input[1:] != node.input[1:] for one in back):
        raise _refused(f"integers of {source} go another way than through DequantizeLinear")
    names = [one.output[0] for one in back]
    graph.rounded |= {name: (source, numpy.float32(scale.item())) for name in names}
    readers = [reader for name in names for reader in graph.readers.get(name, [])]
    if source in graph.stored:
        graph.names |= {name: graph.names[source] for name in names}
    elif len(readers) > 1 and all(one.op_type in ("Conv", "Gemm") for one in readers):  # rounded once for all
        label = node.output[0]
        graph.add("Quantize", label, [graph.blob(source)], label, {0: 1}, _floats(1 / scale))
        graph.names |= {name: graph.names[label] for name in names}


def _dequantize(graph: _Lowering, node: NodeProto) -> None:
    if node.output[0] not in graph.rounded:
        raise _refused(f"{node.output[0]} has other integers than those of a QuantizeLinear")


WRITERS: dict[str, Callable[[_Lowering, NodeProto], None]] = {
    **dict.fromkeys(_BINARY, _binary),
    **dict.fromkeys(_SIMPLE, _simple),
    **dict.fromkeys(_SAME, _same),
    "AveragePool": _pool,
    "BatchNormalization": _normalize,
    "Clip": _clip,
    "Concat": _concat,
    "Conv": _conv,
    "DequantizeLinear": _dequantize,
    "Flatten": _flatten,
    "Gemm": _gemm,
    "GlobalAveragePool": _mean,
    "Max": _maximum,
    "MaxPool": _pool,
    "QuantizeLinear": _quantize,
    "ReduceMean": _mean,
    "Reshape": _flatten,
}


def attributes(node: NodeProto) -> dict[str, Any]:
    return {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}


def _shape(graph: _Lowering, node: NodeProto) -> tuple[int, ...]:
    """Of a layer's weights."""
    name = node.input[1]
    value = graph.integers[name].values if name in graph.integers else graph.value(name)
    if value is None:
        raise _refused(f"the weights of {node.output[0]} are computed")
    return value.shape


def _pads(node: NodeProto) -> list[int]:
    """Top, left, bottom, right."""
    entries = attributes(node)
    if entries.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise _refused(f"{node.output[0]} leaves its padding to the runtime (auto_pad)")
    return entries.get("pads", [0, 0, 0, 0])


def _split(layers: Sequence[Layer]) -> list[Layer]:
    """The same with a Split behind each blob that several read: in ncnn a blob has one reader."""
    readers: dict[str, list[tuple[Layer, int]]] = {}
    for layer in layers:
        for place, name in enumerate(layer.bottoms):
            readers.setdefault(name, []).append((layer, place))
    made: list[Layer] = []
    for layer in layers:
        made.append(layer)
        for name in layer.tops:
            if len(readers.get(name, [])) > 1:
                tops = [f"{name}:{number}" for number in range(len(readers[name]))]
                for (reader, place), top in zip(readers[name], tops, strict=True):
                    reader.bottoms[place] = top
                made.append(Layer("Split", f"{name}:split", [name], tops))
    return made


def _entry(key: int, value: Any) -> str:
    if isinstance(value, list):  # an array: its number is -23300 - key, its length comes first
        return f"{-23300 - key}={len(value)}," + ",".join(map(_number, value))
    return f"{key}={_number(value)}"


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.9e}"


def _floats(value: Any) -> bytes:
    return numpy.asarray(value, "<f4").tobytes()


def _flagged(flag: int, data: bytes) -> bytes:
    """Numbers and what they are stored as; what follows begins at a multiple of four bytes."""
    return flag.to_bytes(4, "little") + data + bytes(-len(data) % 4)


def _refused(why: str) -> EdgekitError:
    return EdgekitError(why, where="ncnn")
