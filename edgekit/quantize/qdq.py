"""The QDQ graph: integer tensors between operators, each operator between a DequantizeLinear and a QuantizeLinear.

A runtime fuses such a trio into one integer kernel. So that it can, every quantized operator gets all its inputs and
its output quantized, its bias as int32 at the scale of its products, and the ReLU or Clip behind it is left out where
the range of the output tensor does its work.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import onnx
from onnx import NodeProto, helper, numpy_helper
from torch import Tensor

from edgekit.errors import choose
from edgekit.files import digest
from edgekit.quantize.calibrate import ranges
from edgekit.quantize.scheme import Scheme
from edgekit.quantize.settings import Settings
from edgekit.quantize.shield import shield
from edgekit.quantize.slim import storable
from edgekit.quantize.ties import settle

_WEIGHTED = ("Conv", "Gemm")
_MOVING = ("Flatten", "Reshape", "MaxPool")  # hand integers on as they are: input and output share one scale


@dataclass(frozen=True)
class Quantized:
    """model: the QDQ graph. calibration: artifact.json's record. in_float: operators that stay float, by type."""

    model: onnx.ModelProto
    calibration: dict[str, object]
    in_float: dict[str, int]


def quantize(model: onnx.ModelProto, images: Tensor, scheme: Scheme, settings: Settings = Settings()) -> Quantized:
    """Quantize an fp32 graph whose batch normalization is folded.

    Args:
        model: fp32; one input (N, C, H, W), one output of logits, which stay float.
        images: (M, C, H, W) float32 in [0, 1]; their activations set the ranges (smallest to largest, zero included).
    Raises:
        EdgekitError: `settings` names a layer that there is not.
    """
    source = _prepared(model)
    graph = _Graph(source)
    quantizable = {_layer(node): node for node in source.graph.node if graph.quantizable(node)}
    kept = {choose(dict.fromkeys(quantizable, name), name, "layer") for name in settings.in_float}
    chosen: list[NodeProto] = []
    for name, node in reversed(quantizable.items()):
        # What only hands integers on is worth it where an integer operator reads them.
        read = any(any(reader is one for one in chosen) for reader in graph.consumers.get(node.output[0], ()))
        if name not in kept and (read or node.op_type not in _MOVING):
            chosen.insert(0, node)
    # Where each operator's result is quantized: behind the activation that follows it alone, else directly.
    absorbed: dict[str, NodeProto] = {}
    for node in chosen:
        follower = graph.only_consumer(node.output[0])
        if follower is not None and graph.is_clip(follower) and follower.output[0] not in graph.outputs:
            absorbed[node.output[0]] = follower
    removed = {follower.output[0]: name for name, follower in absorbed.items()}
    points: dict[str, None] = {}  # tensors that become integers, in graph order
    for node in chosen:
        for name in graph.activations(node):
            points[name] = None
        result = absorbed[node.output[0]].output[0] if node.output[0] in absorbed else node.output[0]
        if result not in graph.outputs:
            points[result] = None
    found = ranges(source, points, images)
    parameters = {name: _activation(*found[name]) for name in points}
    for node in chosen:
        if node.op_type in _MOVING and node.output[0] in parameters:
            parameters[node.output[0]] = parameters[node.input[0]]
        result = absorbed[node.output[0]].output[0] if node.output[0] in absorbed else node.output[0]
        if node.op_type == "Add" and result in parameters:
            scale, zero = settle(parameters[node.input[0]], parameters[node.input[1]], parameters[result])
            parameters[result] = scale, numpy.uint8(zero)
    written = shield(_write(source, graph, chosen, removed, parameters, scheme))
    record = {"images": len(images), "sha256": digest(images.contiguous().numpy().tobytes()), "method": "min-max"}
    kinds = {id(node) for node in chosen} | {id(follower) for follower in absorbed.values()}
    floats = Counter(node.op_type for node in source.graph.node if id(node) not in kinds and node.op_type != "Constant")
    return Quantized(written, record, dict(sorted(floats.items())))


def layers(model: onnx.ModelProto) -> list[str]:
    """The layers of an fp32 graph that can be quantized, in its order: those with weights by the name of their module,
    additions and averages by that of their result."""
    source = _prepared(model)
    graph = _Graph(source)
    return [_layer(node) for node in source.graph.node if graph.quantizable(node) and node.op_type not in _MOVING]


def _prepared(model: onnx.ModelProto) -> onnx.ModelProto:
    source = onnx.ModelProto()
    source.CopyFrom(model)
    _pool(source)
    return source


def _layer(node: NodeProto) -> str:
    return node.input[1].removesuffix(".weight") if node.op_type in _WEIGHTED else node.output[0]


class _Graph:
    """Who makes and who reads each tensor of a model."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        for node in model.graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        self.outputs = {value.name for value in model.graph.output}
        self.consumers: dict[str, list[NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self.consumers.setdefault(name, []).append(node)

    def only_consumer(self, name: str) -> NodeProto | None:
        readers = self.consumers.get(name, [])
        return readers[0] if len(readers) == 1 and name not in self.outputs else None

    def activations(self, node: NodeProto) -> list[str]:
        """The inputs that are computed; weights, biases and shapes are constants."""
        return [name for name in node.input if name and name not in self.constants]

    def quantizable(self, node: NodeProto) -> bool:
        computed = self.activations(node)
        if node.op_type in _WEIGHTED:
            constant = all(name in self.constants for name in node.input[1:])
            plain = node.op_type == "Conv" or all(
                entry.name == "transB" or helper.get_attribute_value(entry) in (0, 1.0) for entry in node.attribute
            )
            return computed == [node.input[0]] and constant and plain
        if node.op_type == "Add":
            return len(computed) == 2
        return node.op_type == "GlobalAveragePool" or node.op_type in _MOVING

    def is_clip(self, node: NodeProto) -> bool:
        """Whether the node cuts at 0 below (and perhaps somewhere above): what an unsigned range does by itself."""
        if node.op_type == "Relu":
            return True
        return (
            node.op_type == "Clip"
            and len(node.input) > 1
            and node.input[1] in self.constants
            and float(self.constants[node.input[1]]) == 0
        )


def _pool(model: onnx.ModelProto) -> None:
    """ReduceMean over height and width -> GlobalAveragePool, for which runtimes have an integer kernel."""
    graph = _Graph(model)
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        axes = graph.constants.get(node.input[1]) if node.op_type == "ReduceMean" and len(node.input) > 1 else None
        keeps = [entry.i for entry in node.attribute if entry.name == "keepdims"] or [1]
        if axes is None or sorted(axes.tolist()) not in ([2, 3], [-2, -1]):
            nodes.append(node)
            continue
        name = node.output[0]
        pooled = name if keeps[0] else f"{name}_pooled"
        nodes.append(helper.make_node("GlobalAveragePool", [node.input[0]], [pooled], name=f"{name}_pool"))
        if not keeps[0]:
            nodes.append(helper.make_node("Flatten", [pooled], [name], name=f"{name}_flatten", axis=1))
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _activation(low: float, high: float) -> tuple[numpy.float32, numpy.uint8]:
    """Scale and zero point of unsigned 8 bits over [low, high], widened to hold zero exactly."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = numpy.float32((high - low) / 255) or numpy.float32(1)
    return scale, numpy.uint8(numpy.clip(round(-low / float(scale)), 0, 255))


def _weight(weights: numpy.ndarray, largest: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """int8 weights (O, …) in [-largest, largest] and their float32 scales (O,)."""
    peak = numpy.abs(weights).reshape(len(weights), -1).max(1)
    scale = storable(numpy.where(peak > 0, peak / largest, 1).astype(numpy.float32))
    shaped = scale.reshape(-1, *[1] * (weights.ndim - 1))
    return numpy.clip(numpy.rint(weights / shaped), -largest, largest).astype(numpy.int8), scale


def _write(
    source: onnx.ModelProto,
    graph: _Graph,
    chosen: Sequence[NodeProto],
    removed: dict[str, str],
    parameters: dict[str, tuple[numpy.float32, numpy.uint8]],
    scheme: Scheme,
) -> onnx.ModelProto:
    nodes: list[NodeProto] = []
    constants: dict[str, numpy.ndarray] = {}
    integral = {id(node) for node in chosen}

    def constant(name: str, value: numpy.ndarray) -> str:
        constants[name] = value
        return name

    def quantized(name: str, made: str) -> None:
        """QuantizeLinear and DequantizeLinear of the tensor `made`, whose readers know it as `name`."""
        scale, zero = parameters[name]
        pair = [constant(f"{name}_scale", numpy.array(scale)), constant(f"{name}_zero_point", numpy.array(zero))]
        nodes.append(helper.make_node("QuantizeLinear", [made, *pair], [f"{name}_quantized"], name=f"{name}_q"))
        nodes.append(
            helper.make_node(
                "DequantizeLinear", [f"{name}_quantized", *pair], [f"{name}_dequantized"], name=f"{name}_dq"
            )
        )

    def dequantized(name: str, value: numpy.ndarray, scale: numpy.ndarray) -> str:
        if f"{name}_quantized" in constants:  # weights that two layers share
            return f"{name}_dequantized"
        inputs = [constant(f"{name}_quantized", value), constant(f"{name}_scale", scale)]
        inputs.append(constant(f"{name}_zero_point", numpy.zeros(len(scale), value.dtype)))
        nodes.append(helper.make_node("DequantizeLinear", inputs, [f"{name}_dequantized"], name=f"{name}_dq", axis=0))
        return f"{name}_dequantized"

    for value in source.graph.input:
        if value.name in parameters:
            quantized(value.name, value.name)
    for node in source.graph.node:
        result = node.output[0]
        if result in removed:  # a ReLU or Clip that the range of its output replaces
            quantized(result, removed[result])
            continue
        copy = NodeProto()
        copy.CopyFrom(node)
        inputs = [f"{name}_dequantized" if name in parameters else name for name in node.input]
        if id(node) in integral and node.op_type in _WEIGHTED:
            weights, transposed = graph.constants[node.input[1]], False
            if node.op_type == "Gemm":
                transposed = not any(entry.name == "transB" and entry.i for entry in node.attribute)
            if transposed:
                weights = weights.T
                del copy.attribute[:]
                copy.attribute.append(helper.make_attribute("transB", 1))
            depthwise = (
                node.op_type == "Conv"
                and weights.shape[1] == 1
                and any(entry.name == "group" and entry.i == len(weights) for entry in node.attribute)
            )
            largest = 127 if depthwise or not scheme.cannot_saturate else 64
            stored, scale = _weight(weights, largest)
            inputs[1] = dequantized(node.input[1], stored, scale)
            if len(node.input) > 2:
                products = (parameters[node.input[0]][0] * scale).astype(numpy.float32)
                bias = numpy.rint(graph.constants[node.input[2]].astype(numpy.float64) / products)
                stored = numpy.clip(bias, -(2**31), 2**31 - 1).astype(numpy.int32)
                # Named after the layer: two layers may share a bias, their products' scales differ.
                inputs[2] = dequantized(f"{result}_bias", stored, products)
        del copy.input[:]
        copy.input.extend(inputs)
        nodes.append(copy)
        if result in parameters:
            quantized(result, result)
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in source.graph.initializer if tensor.name in used]
    fresh = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    body = helper.make_graph(nodes, source.graph.name, source.graph.input, source.graph.output, [*kept, *fresh])
    return helper.make_model(body, opset_imports=source.opset_import, ir_version=source.ir_version)
