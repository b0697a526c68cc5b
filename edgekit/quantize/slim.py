"""A QDQ graph in fewer bytes, with the same answers to the last bit.

What a runtime knows or computes for itself when it loads the file is left out: zero points that are zero; the scales of
a bias, which are the products of two others; the upper half of integers and floats that fit the lower one, behind a
Cast; and long names. Runtimes fold constants before they look for layers to fuse: they run what they ran before.
"""

from collections.abc import Iterator
from itertools import count, product
from string import ascii_lowercase

import numpy
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

# Bytes that a Cast or a Mul takes: less than that is not worth a node.
WORTH = 64
SMALLEST = float(numpy.finfo(numpy.float16).smallest_normal)  # below, 16 bits hold fewer than 11 digits


def storable(scale: numpy.ndarray) -> numpy.ndarray:
    """float32 scales rounded to what 16 bits hold, by 1 part in 2,048 at most; as they are where that is too coarse."""
    inside = (scale >= SMALLEST) & (scale <= numpy.finfo(numpy.float16).max)
    halved = numpy.where(inside, scale, 1).astype(numpy.float16).astype(numpy.float32)
    return numpy.where(inside, halved, scale)


def slim(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same QDQ graph, smaller. Inputs, outputs, and integers of weights keep their names."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    _drop_zero_points(made)
    _multiply_bias_scales(made)
    _halve(made)
    _shorten(made)
    return made


def _arrays(model: onnx.ModelProto) -> dict[str, numpy.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def _keep_read(model: onnx.ModelProto) -> None:
    """Drop initializers that nobody reads."""
    read = {name for node in model.graph.node for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def _drop_zero_points(model: onnx.ModelProto) -> None:
    """A DequantizeLinear without one subtracts 0; equal ones of activations are stored once."""
    arrays = _arrays(model)
    # ONNX Runtime makes no integer kernel of a Gemm whose weights have scales for each channel and no zero points.
    dense = {node.input[1] for node in model.graph.node if node.op_type in ("Gemm", "MatMul")}
    shared: dict[tuple[str, int], str] = {}
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or len(node.input) < 3:
            continue
        zero = arrays.get(node.input[2])
        if zero is None:
            continue
        if (
            node.op_type == "DequantizeLinear"
            and node.output[0] not in dense
            and node.input[0] in arrays
            and not zero.any()
        ):
            del node.input[2]
        elif zero.ndim == 0:
            node.input[2] = shared.setdefault((zero.dtype.name, int(zero)), node.input[2])
    _keep_read(model)


def _multiply_bias_scales(model: onnx.ModelProto) -> None:
    """The scale of a bias is the scale of the activations times that of the weights: a Mul where that holds exactly."""
    arrays = _arrays(model)
    maker = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    before: dict[int, NodeProto] = {}
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm") or len(node.input) < 3 or any(one not in maker for one in node.input):
            continue
        x, weight, bias = (maker[name] for name in node.input)
        scales = [arrays.get(one.input[1]) for one in (x, weight, bias)]
        if any(scale is None for scale in scales) or id(bias) in before:
            continue
        factor, weights, products = (numpy.asarray(scale) for scale in scales)
        if 4 * products.size > WORTH and (factor * weights).astype(numpy.float32).tobytes() == products.tobytes():
            before[id(bias)] = helper.make_node("Mul", [x.input[1], weight.input[1]], [bias.input[1]])
    nodes = [one for node in model.graph.node for one in (before.get(id(node)), node) if one is not None]
    _replace(model, nodes, {node.output[0] for node in before.values()})


def _halve(model: onnx.ModelProto) -> None:
    """Scales in 16-bit floats and biases in 16-bit integers, behind a Cast, where no digit is lost."""
    scales = {node.input[1] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    casts, fresh = [], []
    for tensor in model.graph.initializer:
        value = numpy_helper.to_array(tensor)
        if tensor.data_type == TensorProto.INT32:
            half = value.astype(numpy.int16)
        elif tensor.data_type == TensorProto.FLOAT and tensor.name in scales:
            with numpy.errstate(over="ignore"):
                half = value.astype(numpy.float16)
        else:
            continue
        if value.nbytes - half.nbytes > WORTH and (half.astype(value.dtype) == value).all():
            fresh.append(numpy_helper.from_array(half, f"{tensor.name}_half"))
            casts.append(helper.make_node("Cast", [f"{tensor.name}_half"], [tensor.name], to=tensor.data_type))
    _replace(model, [*casts, *model.graph.node], {node.output[0] for node in casts})
    model.graph.initializer.extend(fresh)


def _replace(model: onnx.ModelProto, nodes: list[NodeProto], gone: set[str]) -> None:
    """The graph with other nodes, without the initializers `gone`."""
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in gone]
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    del model.graph.node[:]
    model.graph.node.extend(copies)


def _names(taken: set[str]) -> Iterator[str]:
    for length in count(1):
        for letters in product(ascii_lowercase, repeat=length):
            if (name := "".join(letters)) not in taken:
                yield name


def _shorten(model: onnx.ModelProto) -> None:
    """Short names for all but inputs, outputs and weights, which people look up; nodes that only convert have none."""
    weights = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) > 1}
    kept = weights | {value.name for value in (*model.graph.input, *model.graph.output)} | {""}
    fresh, known = _names(kept), dict[str, str]()

    def short(name: str) -> str:
        if name in kept:
            return name
        if name not in known:
            known[name] = next(fresh)
        return known[name]

    for node in model.graph.node:
        node.input[:] = [short(name) for name in node.input]
        node.output[:] = [short(name) for name in node.output]
        if node.op_type in ("QuantizeLinear", "DequantizeLinear", "Cast", "Mul"):
            node.name = ""
    for tensor in model.graph.initializer:
        tensor.name = short(tensor.name)
    del model.graph.value_info[:]
