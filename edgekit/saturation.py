"""The proof, from the file alone, that no x86 kernel can clip a sum of two products.

Without VNNI, products of unsigned 8-bit activations and signed 8-bit weights are summed in pairs in signed 16 bits.
A pair of weights is safe if its positive ones sum to at most 128 and its negative ones to at least -128:
255 * 128 < 2^15 <= 255 * 129. Depthwise convolutions with multiplier 1 run in another kernel and never pair.
"""

import numpy
import onnx
from onnx import numpy_helper


def unsafe_pairs(model: onnx.ModelProto) -> dict[str, int]:
    """For each layer that pairs products, by the name of its weights: the pairs that some input makes clip."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    dequantized = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    found: dict[str, int] = {}
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        sources = [dequantized.get(name) for name in node.input[:2]]
        if sources[0] is None or sources[1] is None or sources[1].input[0] not in constants:
            continue
        tensor = constants[sources[1].input[0]]
        if tensor.data_type != onnx.TensorProto.INT8:
            continue  # only signed weights are paired in 16 bits
        weights = numpy_helper.to_array(tensor).astype(numpy.int64)
        attributes = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
        if node.op_type == "Conv":
            if attributes.get("group", 1) == len(weights) and weights.shape[1] == 1:
                continue
            # The kernel walks a window row by row, column by column, with the input channels fastest.
            rows = numpy.moveaxis(weights, 1, -1).reshape(len(weights), -1)
        else:
            rows = weights if attributes.get("transB", 0) else weights.reshape(-1, weights.shape[-1]).T
        found[tensor.name] = int(clips(rows).sum())
    return found


def clips(rows: numpy.ndarray) -> numpy.ndarray:
    """bool (O, ceil(K / 2)) for weights (O, K): whether some unsigned 8-bit input makes the pair 2i, 2i + 1 clip."""
    padded = numpy.pad(rows, ((0, 0), (0, rows.shape[1] % 2)))
    pairs = padded.reshape(len(rows), -1, 2)
    return (pairs.clip(min=0).sum(2) > 128) | (pairs.clip(max=0).sum(2) < -128)
