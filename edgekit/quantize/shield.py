"""Layers that stay float, kept float: ONNX Runtime quantizes them when it loads the file, by itself and per tensor.

Its WeightBiasQuantization takes every layer between a DequantizeLinear and a QuantizeLinear (a Clip between them is
gone by then) and makes the weights 8 bits, which nobody chose, and whose pairs may saturate.
"""

import onnx
from onnx import helper

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def shield(model: onnx.ModelProto) -> onnx.ModelProto:
    """The QDQ graph `model`, with the largest of one value, the value itself, in front of each float layer on integers:
    no optimization takes that away, and behind it the layer is none that ONNX Runtime quantizes."""
    shielded = onnx.ModelProto()
    shielded.CopyFrom(model)
    dequantized = {name for node in model.graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    nodes, made = [], set[str]()
    for source in model.graph.node:
        node = onnx.NodeProto()
        node.CopyFrom(source)
        if node.op_type in _LAYERS and node.input[0] in dequantized and node.input[1] not in dequantized:
            name = f"{node.input[0]}_float"
            if name not in made:
                nodes.append(helper.make_node("Max", [node.input[0]], [name], name=name))
                made.add(name)
            node.input[0] = name
        nodes.append(node)
    del shielded.graph.node[:]
    shielded.graph.node.extend(nodes)
    return shielded
