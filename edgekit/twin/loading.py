"""What ONNX Runtime changes in a file as it loads it, answers included.

Float weights between grids are rounded: a convolution or product whose input is dequantized and whose output is
quantized is run on integers even if the file holds its weights or bias as floats (quantization-aware training through
tf2onnx; quantizers that touch activations only). The runtime rounds such weights to int8, one scale for all channels,
and the bias to int32. Signed averages become integer kernels where the grids on both sides are of one kind.
"""

from collections.abc import Iterator

import torch
from onnx import TensorProto
from torch import Tensor

from edgekit.twin.graph import Graph, Node

_LAYERS = ("Conv", "ConvTranspose", "Gemm")
_ACTIVATIONS = ("Relu", "Clip")
# Quantization is moved across these before the runtime looks for what stands between.
_MOVERS = ("MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")


def round_weights(graph: Graph) -> None:
    """Put integers and their DequantizeLinear in the place of the float weights and biases that the runtime rounds."""
    makers, readers = _makers(graph), _readers(graph)
    nodes: list[Node] = []
    for node in graph.nodes:
        if node.type in _LAYERS and _leads_to_grid(node, readers):
            source = _dequantized(node, makers, readers)
            step = None if source is None else graph.constants.get(source.inputs[1])
            if step is not None and step.numel() == 1:
                nodes.extend(_rounded(graph, node, step.reshape([]), makers))
        nodes.append(node)
    graph.nodes = nodes


def mark_averages(graph: Graph) -> None:
    """Say of each AveragePool whether it is run on integers (attribute `fused`), and whether on unsigned ones.

    On x86 the runtime makes a signed QuantizeLinear and the only DequantizeLinear that reads it unsigned, and leaves
    those with other readers as they are. A pool between one of each kind is run on floats, which rounds otherwise.
    """
    makers, readers = _makers(graph), _readers(graph)
    for node in graph.nodes:
        if node.type == "AveragePool":
            source, sink = _dequantized(node, makers, readers), _quantizer(node, readers)
            node.attributes["fused"] = False
            if source is not None and sink is not None:
                moved = node.inputs[0] != source.outputs[0]  # what is quantized again on its way has one reader
                before = not moved and _signed(graph, source, makers.get(source.inputs[0]), readers)
                after = _signed(graph, sink, sink, readers)
                node.attributes |= {"fused": before == after, "unsigned": not after}


def _quantizer(node: Node, readers: dict[str, list[Node]]) -> Node | None:
    """The QuantizeLinear, and only reader, of a node's output, perhaps after activations."""
    while len(found := readers.get(node.outputs[0], [])) == 1:
        (node,) = found
        if node.type not in _ACTIVATIONS:
            return node if node.type == "QuantizeLinear" else None
    return None


def _signed(graph: Graph, says: Node, maker: Node | None, readers: dict[str, list[Node]]) -> bool:
    """Whether integers of the type that the node `says` has are signed in the runtime too; `maker` makes them."""
    if len(says.inputs) < 3 or graph.kinds.get(says.inputs[2]) != TensorProto.INT8:
        return False
    if maker is None or maker.type != "QuantizeLinear":
        return True
    read = readers.get(maker.outputs[0], [])
    # A DequantizeLinear with several readers is doubled for each of them.
    return len(read) != 1 or read[0].type != "DequantizeLinear" or len(readers.get(read[0].outputs[0], [])) > 1


def _makers(graph: Graph) -> dict[str, Node]:
    return {name: node for node in graph.nodes for name in node.outputs}


def _readers(graph: Graph) -> dict[str, list[Node]]:
    readers: dict[str, list[Node]] = {}
    for node in graph.nodes:
        for name in node.inputs:
            readers.setdefault(name, []).append(node)
    return readers


def _dequantized(node: Node, makers: dict[str, Node], readers: dict[str, list[Node]]) -> Node | None:
    """The DequantizeLinear that a layer's input comes from."""
    made_by = makers.get(node.inputs[0])
    while made_by is not None and made_by.type in _MOVERS and len(readers[made_by.outputs[0]]) == 1:
        made_by = makers.get(made_by.inputs[0])
    return made_by if made_by is not None and made_by.type == "DequantizeLinear" else None


def _leads_to_grid(node: Node, readers: dict[str, list[Node]]) -> bool:
    """Whether a QuantizeLinear, and nothing else, reads the layer, perhaps after activations and then movers."""
    allowed = (*_ACTIVATIONS, *_MOVERS)
    while len(found := readers.get(node.outputs[0], [])) == 1:
        (node,) = found
        if node.type == "QuantizeLinear":
            return True
        if node.type not in allowed:
            return False
        allowed = _MOVERS if node.type in _MOVERS else allowed
    return False


def _rounded(graph: Graph, layer: Node, step: Tensor, makers: dict[str, Node]) -> Iterator[Node]:
    """The nodes that dequantize the layer's weights and bias, its inputs changed to theirs."""
    weight, bias = layer.inputs[1], layer.inputs[2] if len(layer.inputs) > 2 else ""
    held = graph.constants.get(bias)
    if bias and (held is None or held.ndim != 1):  # the runtime then leaves the weights alone as well
        return
    if weight in graph.constants:
        if graph.kinds.get(weight) != TensorProto.FLOAT:
            return
        integers, scale, zero = _to_int8(graph.constants[weight])
        yield _dequantizer(graph, layer, 1, integers, scale, zero)
    else:
        made_by = makers.get(weight)
        if made_by is None or made_by.type != "DequantizeLinear" or made_by.get("block_size", 0):
            return
        scale = graph.constants.get(made_by.inputs[1])
        if scale is None or (scale.numel() > 1 and (held is None or scale.numel() != held.numel())):
            return
    if held is not None:
        fine = (step * scale).reshape([-1] if scale.numel() > 1 else [])
        yield _dequantizer(graph, layer, 2, (held / fine).round().to(torch.int32), fine, torch.zeros_like(fine).int())


def _to_int8(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Integers, scale and zero point over the whole range of the weights, 0 within it."""
    low, high = weight.min().clamp(max=0), weight.max().clamp(min=0)
    scale = (high - low) / 255 if high > low else torch.ones([])
    zero = (-128 - low / scale).round()
    return ((weight / scale).round() + zero).clamp(-128, 127).to(torch.int8), scale, zero.to(torch.int8)


def _dequantizer(graph: Graph, layer: Node, place: int, integers: Tensor, scale: Tensor, zero: Tensor) -> Node:
    name = f"{layer.name}/{layer.inputs[place]}/rounded"
    parts = {f"{name}/integers": integers, f"{name}/scale": scale, f"{name}/zero": zero}
    graph.constants.update(parts)
    layer.inputs[place] = name
    return Node("DequantizeLinear", name, list(parts), [name], {"axis": 0}, max(layer.opset, 13), layer.where)
