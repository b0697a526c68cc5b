"""The QDQ graph: integer tensors between operators, each operator between a DequantizeLinear and a QuantizeLinear.

A runtime fuses such a trio into one integer kernel. So that it can, every quantized operator gets all its inputs and
its output quantized, its bias as int32 at the scale of its products, and the ReLU or Clip behind it is left out where
the range of the output tensor does its work.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import onnx
from onnx import NodeProto, helper, numpy_helper
from torch import Tensor

from edgekit.errors import EdgekitError, choose
from edgekit.files import digest
from edgekit.quantize.calibrate import METHODS, histograms, ranges
from edgekit.quantize.correct import correct
from edgekit.quantize.equalize import equalize
from edgekit.quantize.scheme import Grid, Scheme
from edgekit.quantize.settings import Settings
from edgekit.quantize.ties import settle
from edgekit.quantize.weights import weigh

_WEIGHTED = ("Conv", "Gemm")
BEFORE = "it works on the image or on constants alone"
FLOATS = "the runtime has floats there"  # whatever the file says: Scheme.only
_MOVING = ("Flatten", "Reshape", "MaxPool")  # hand integers on as they are: input and output share one scale


@dataclass(frozen=True)
class Quantized:
    """What became of a graph.

    Attributes:
        model: the QDQ graph.
        calibration: artifact.json's record.
        in_float: operators that stay float, by type.
        float_layers: the same one by one: {"layer", "operator", "reason"}. The reasons BEFORE and FLOATS are no loss.
        source: the fp32 graph with the weights that were rounded.
        trained: artifact.json's record of a training that went on from there (qat.py).
    """

    model: onnx.ModelProto
    calibration: dict[str, object]
    in_float: dict[str, int]
    float_layers: list[dict[str, str]]
    source: onnx.ModelProto
    trained: dict[str, Any] | None = None


def quantize(
    model: onnx.ModelProto,
    images: Tensor,
    scheme: Scheme,
    settings: Settings = Settings(),
    memo: dict[Any, Any] | None = None,
) -> Quantized:
    """Quantize an fp32 graph whose batch normalization is folded.

    Args:
        model: fp32; one input (N, C, H, W), one output of logits, which stay float.
        images: (M, C, H, W) float32 in [0, 1]; their activations set the ranges, which always include zero.
        memo: one dict for several calls that differ in `settings` alone, and in `images` as `settings.adversarial`
            does: what they have in common is computed once.
    Raises:
        EdgekitError: `settings` names a layer, method or rule that there is not, or the scheme is none that is written.
    """
    if scheme.weights.bits != 8 or scheme.activations.bits != 8 or scheme.activations.granularity != "tensor":
        raise EdgekitError("only 8 bits, and activations by tensor, can be written", where=f"scheme {scheme.name}")
    cut = choose(METHODS, settings.method, "calibration method")
    memo = {} if memo is None else memo

    def once(key: Any, make: Callable[[], Any]) -> Any:
        if key not in memo:
            memo[key] = make()
        return memo[key]

    source = once("source", lambda: _prepared(model))
    version = settings.equalize and ("equalized", settings.adversarial)  # which weights are quantized
    if version:
        source = once(version, lambda: equalize(source, images, scheme))
    graph = _Graph(source, scheme)
    quantizable = {_layer(node): node for node in source.graph.node if graph.obstacle(node) is None}
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
    followers = {follower.output[0]: name for name, follower in absorbed.items()}
    points: dict[str, None] = {}  # tensors that become integers, in graph order
    for node in chosen:
        for name in graph.activations(node):
            points[name] = None
        result = absorbed[node.output[0]].output[0] if node.output[0] in absorbed else node.output[0]
        if result not in graph.outputs and scheme.only is None:
            points[result] = None
    seen = (version, settings.adversarial, tuple(points))
    found = once(("ranges", *seen), lambda: ranges(source, points, images))
    if settings.method != "min-max":
        counted = once(("histograms", *seen), lambda: histograms(source, found, images))
        found = {name: cut(histogram, scheme.activations) for name, histogram in counted.items()}
    parameters = {name: scheme.activations.grid(*found[name]) for name in points}
    for node in chosen:
        if node.op_type in _MOVING and node.output[0] in parameters:
            parameters[node.output[0]] = parameters[node.input[0]]
        result = absorbed[node.output[0]].output[0] if node.output[0] in absorbed else node.output[0]
        if node.op_type == "Add" and result in parameters:
            parameters[result] = settle(parameters[node.input[0]], parameters[node.input[1]], parameters[result])

    def weigher(name: str, weights: numpy.ndarray, pairs: bool) -> tuple[numpy.ndarray, ...]:
        key = ("weights", version, settings.weights, name)
        return once(key, lambda: weigh(weights, scheme.weights, pairs=pairs, rule=settings.weights))

    written = _write(source, graph, chosen, followers, parameters, scheme, settings, weigher)
    if settings.correct:
        written = correct(source, written, images)
    record = {"images": len(images), "sha256": digest(images.contiguous().numpy().tobytes())} | settings.record()
    kinds = {id(node) for node in chosen} | {id(follower) for follower in absorbed.values()}
    floats = Counter(node.op_type for node in source.graph.node if id(node) not in kinds and node.op_type != "Constant")
    reasons = _reasons(source, graph, kinds, kept)
    return Quantized(written, record, dict(sorted(floats.items())), reasons, source)


def _reasons(source: onnx.ModelProto, graph: "_Graph", integral: set[int], kept: set[str]) -> list[dict[str, str]]:
    """Each operator that stays float, and why."""
    found = []
    image = {value.name for value in source.graph.input}  # what is made of the image alone, before the first layer
    for node in source.graph.node:
        if id(node) in integral or node.op_type == "Constant":
            continue
        named = node.op_type not in _WEIGHTED or node.input[1] in graph.constants
        name = _layer(node) if named else node.output[0]
        if node.op_type not in _WEIGHTED and image.issuperset(graph.activations(node)):
            image.update(node.output)
            reason = BEFORE
        elif name in kept:
            reason = "it was chosen to"
        elif graph.is_clip(node) and graph.only is None:
            reason = "it follows no integer operator alone"
        else:
            reason = graph.obstacle(node) or "no integer operator reads it"
        found.append({"layer": name, "operator": node.op_type, "reason": reason})
    return found


def layers(model: onnx.ModelProto) -> list[str]:
    """The layers of an fp32 graph that can be quantized, in its order: those with weights by the name of their module,
    additions and averages by that of their result."""
    source = _prepared(model)
    graph = _Graph(source)
    return [_layer(node) for node in source.graph.node if graph.obstacle(node) is None and node.op_type not in _MOVING]


def _prepared(model: onnx.ModelProto) -> onnx.ModelProto:
    source = onnx.ModelProto()
    source.CopyFrom(model)
    _pool(source)
    return source


def _layer(node: NodeProto) -> str:
    return node.input[1].removesuffix(".weight") if node.op_type in _WEIGHTED else node.output[0]


def _alone(node: NodeProto, weights: numpy.ndarray | None) -> bool:
    """Whether a convolution works on each channel by itself."""
    grouped = any(entry.name == "group" and weights is not None and entry.i == len(weights) for entry in node.attribute)
    return grouped and weights is not None and weights.shape[1] == 1


class _Graph:
    """Who makes and who reads each tensor of a model."""

    def __init__(self, model: onnx.ModelProto, scheme: Scheme | None = None) -> None:
        self.only = None if scheme is None else scheme.only
        self.depthwise = scheme is None or scheme.depthwise
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

    def obstacle(self, node: NodeProto) -> str | None:
        """Why the node has no integer form; None where it has one."""
        if self.only is not None and node.op_type not in self.only:
            return FLOATS
        if not self.depthwise and node.op_type == "Conv" and _alone(node, self.constants.get(node.input[1])):
            return FLOATS
        computed = self.activations(node)
        if node.op_type in _WEIGHTED:
            if any(name not in self.constants for name in node.input[1:] if name):
                return "its weights are computed"
            if computed != [node.input[0]]:
                return "its input is a constant"
            plain = node.op_type == "Conv" or all(
                entry.name == "transB" or helper.get_attribute_value(entry) in (0, 1.0) for entry in node.attribute
            )
            return None if plain else "it multiplies by more than its weights"
        if node.op_type == "Add":
            return None if len(computed) == 2 else "it adds a constant"
        known = node.op_type == "GlobalAveragePool" or node.op_type in _MOVING
        return None if known else f"{node.op_type} has no integer form here"

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


def _floating(model: onnx.ModelProto, graph: _Graph, integral: set[int]) -> set[str]:
    """What layers that stay float make, and what a ReLU or Clip makes of that."""
    found: set[str] = set()
    for node in model.graph.node:
        layer = graph.obstacle(node) is None and node.op_type not in _MOVING and id(node) not in integral
        if layer or (graph.is_clip(node) and node.input[0] in found):
            found.add(node.output[0])
    return found


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


def _write(
    source: onnx.ModelProto,
    graph: _Graph,
    chosen: Sequence[NodeProto],
    followers: dict[str, str],
    parameters: dict[str, Grid],
    scheme: Scheme,
    settings: Settings,
    weigher: Callable[[str, numpy.ndarray, bool], tuple[numpy.ndarray, ...]],
) -> onnx.ModelProto:
    nodes: list[NodeProto] = []
    constants: dict[str, numpy.ndarray] = {}
    integral = {id(node) for node in chosen}
    least = scheme.activations.ends[0]
    floating = _floating(source, graph, integral)

    def constant(name: str, value: numpy.ndarray) -> str:
        constants[name] = value
        return name

    def quantized(name: str, made: str) -> None:
        """QuantizeLinear and DequantizeLinear of the tensor `made`, whose readers know it as `name`."""
        scale, zero = parameters[name]
        pair = [constant(f"{name}_scale", numpy.array(scale)), constant(f"{name}_zero_point", numpy.asarray(zero))]
        nodes.append(helper.make_node("QuantizeLinear", [made, *pair], [f"{name}_quantized"], name=f"{name}_q"))
        nodes.append(
            helper.make_node(
                "DequantizeLinear", [f"{name}_quantized", *pair], [f"{name}_dequantized"], name=f"{name}_dq"
            )
        )

    def dequantized(name: str, value: numpy.ndarray, scale: numpy.ndarray, zero: numpy.ndarray) -> str:
        if f"{name}_quantized" in constants:  # weights that two layers share
            return f"{name}_dequantized"
        inputs = [constant(f"{name}_quantized", value), constant(f"{name}_scale", scale)]
        inputs.append(constant(f"{name}_zero_point", zero))
        axis: dict[str, Any] = {"axis": 0} if scale.ndim else {}
        nodes.append(helper.make_node("DequantizeLinear", inputs, [f"{name}_dequantized"], name=f"{name}_dq", **axis))
        return f"{name}_dequantized"

    for value in source.graph.input:
        if value.name in parameters:
            quantized(value.name, value.name)
    for node in source.graph.node:
        result = node.output[0]
        if result in followers and result in parameters and int(parameters[result][1]) == least:
            # A ReLU or Clip that the range of its output replaces: nothing below zero has an integer.
            quantized(result, followers[result])
            continue
        copy = NodeProto()
        copy.CopyFrom(node)
        whole = id(node) in integral or scheme.only is None
        inputs = [f"{name}_dequantized" if name in parameters and whole else name for name in node.input]
        if id(node) in integral and node.op_type in _WEIGHTED:
            weights, transposed = graph.constants[node.input[1]], False
            if node.op_type == "Gemm":
                transposed = not any(entry.name == "transB" and entry.i for entry in node.attribute)
            if transposed:
                weights = weights.T
                del copy.attribute[:]
                copy.attribute.append(helper.make_attribute("transB", 1))
            pairs = scheme.cannot_saturate and not (node.op_type == "Conv" and _alone(node, weights))
            stored, scale, zero = weigher(node.input[1], weights, pairs)
            inputs[1] = dequantized(node.input[1], stored, scale, zero)
            if len(node.input) > 2 or settings.correct:  # a bias is where a correction goes
                given = graph.constants[node.input[2]] if len(node.input) > 2 else numpy.zeros(len(weights))
                products = (parameters[node.input[0]][0] * scale).astype(numpy.float32)
                bias = numpy.rint(given.astype(numpy.float64) / products)
                stored = numpy.clip(bias, -(2**31), 2**31 - 1).astype(numpy.int32)
                # Named after the layer: two layers may share a bias, their products' scales differ.
                place = dequantized(f"{result}_bias", stored, products, numpy.zeros(scale.shape, numpy.int32))
                inputs[2:] = [place]
        del copy.input[:]
        copy.input.extend(inputs)
        nodes.append(copy)
        if result in parameters and result in floating and scheme.only is None:
            # ONNX Runtime turns what stands between integers into integers as it loads the file: a convolution's
            # weights too, and those with one scale for all channels. Max with the lowest number changes no value, and
            # stands between.
            lowest = constant("lowest", numpy.array(numpy.finfo(numpy.float32).min))
            nodes.append(helper.make_node("Max", [result, lowest], [f"{result}_float"], name=f"{result}_max"))
            quantized(result, f"{result}_float")
        elif result in parameters:
            quantized(result, result)
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in source.graph.initializer if tensor.name in used]
    fresh = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    body = helper.make_graph(nodes, source.graph.name, source.graph.input, source.graph.output, [*kept, *fresh])
    return helper.make_model(body, opset_imports=source.opset_import, ir_version=source.ir_version)
