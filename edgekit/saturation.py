"""The proof, from the file alone, that no x86 kernel can clip a sum of two products.

Without VNNI, products of unsigned 8-bit activations and signed 8-bit weights are summed in pairs in signed 16 bits.
A pair of weights is safe if its positive ones sum to at most 128 and its negative ones to at least -128:
255 * 128 < 2^15 <= 255 * 129. Depthwise convolutions with multiplier 1 run in another kernel and never pair.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy
import onnx
from onnx import NodeProto, TensorProto, numpy_helper


class _Places(NamedTuple):
    """Where an operator of integers has its weights, and the zero point that tells the type of its activations."""

    weights: int
    zero: int | None  # None: they are unsigned


# ConvInteger is computed without pairs, and a u8 x u8 operator is too.
_INTEGER = {
    "QLinearConv": _Places(3, 2),
    "QLinearMatMul": _Places(3, 2),
    "QGemm": _Places(3, 2),
    "MatMulInteger": _Places(1, 2),
    "DynamicQuantizeMatMul": _Places(1, None),
    "MatMulIntegerToFloat": _Places(1, 4),
}


def unsafe_pairs(model: onnx.ModelProto) -> dict[str, int]:
    """For each layer that pairs products, by the name of its weights: the pairs that some input makes clip.

    Layers between DequantizeLinear and QuantizeLinear, and operators of integers; of constant weights.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            constants[node.output[0]] = node.attribute[0].t
    dequantized = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    found: dict[str, int] = {}
    for node in model.graph.node:
        if (name := _paired(node, constants, dequantized)) is None:
            continue
        tensor = constants[name]
        if tensor.data_type != TensorProto.INT8:
            continue  # only signed weights are paired in 16 bits
        weights = numpy_helper.to_array(tensor).astype(numpy.int64)
        attributes = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
        if node.op_type in ("Conv", "QLinearConv"):
            if attributes.get("group", 1) == len(weights) and weights.shape[1] == 1:
                continue
            rows = paired(weights)
        else:
            rows = weights if attributes.get("transB", 0) else weights.reshape(-1, weights.shape[-1]).T
        found[name] = int(clips(rows).sum())
    return found


def _paired(node: NodeProto, constants: Mapping[str, TensorProto], dequantized: Mapping[str, NodeProto]) -> str | None:
    """The name of the constant weights of a layer whose activations are 8 bits; None of any other node."""
    if node.op_type in ("Conv", "Gemm", "MatMul"):
        # Signed activations between DequantizeLinear and a layer are moved to unsigned ones: they pair as well.
        sources = [dequantized.get(name) for name in node.input[:2]]
        name = sources[1].input[0] if sources[0] is not None and sources[1] is not None else None
    elif node.op_type in _INTEGER:
        place = _INTEGER[node.op_type]
        name = node.input[place.weights]
        zero = (
            constants.get(node.input[place.zero]) if place.zero is not None and len(node.input) > place.zero else None
        )
        if zero is not None and zero.data_type == TensorProto.INT8:
            return None
    else:
        return None
    return name if name in constants else None


def paired(weights: numpy.ndarray) -> numpy.ndarray:
    """Weights (O, C, …) in the order in which a kernel pairs them, (O, K).

    It walks a window row by row, column by column, with the input channels fastest.
    """
    return numpy.moveaxis(weights, 1, -1).reshape(len(weights), -1)


def clips(rows: numpy.ndarray) -> numpy.ndarray:
    """bool (O, ceil(K / 2)) for weights (O, K): whether some unsigned 8-bit input makes the pair 2i, 2i + 1 clip."""
    padded = numpy.pad(rows, ((0, 0), (0, rows.shape[1] % 2)))
    first, second = padded[:, 0::2], padded[:, 1::2]
    highest = numpy.maximum(first, 0) + numpy.maximum(second, 0)
    return (highest > 128) | (first + second - highest < -128)


def quantum(model: onnx.ModelProto, output: str) -> float | None:
    """The step between neighbouring scores of a file whose scores are made of integers; None where they are not.

    That is the scale of the grid that the scores are rounded to, or else that of the last layer's integer sums; where
    there is one scale for each class, the largest.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    made_by = {name: node for node in model.graph.node for name in node.output}

    def scale(name: str) -> float | None:
        node = made_by.get(name)
        if node is None or node.op_type != "DequantizeLinear":
            return None
        stored = node.input[1]
        if (cast := made_by.get(stored)) is not None and cast.op_type == "Cast":
            stored = cast.input[0]
        return float(numpy_helper.to_array(constants[stored]).max()) if stored in constants else None

    node = made_by.get(output)
    while node is not None and node.op_type in ("Identity", "Cast", "Reshape", "Flatten", "Squeeze"):
        output = node.input[0]
        node = made_by.get(output)
    if (rounded := scale(output)) is not None:
        return rounded
    if node is None or node.op_type not in ("Gemm", "MatMul"):
        return None
    activations, weights = scale(node.input[0]), scale(node.input[1])
    return None if activations is None or weights is None else activations * weights
