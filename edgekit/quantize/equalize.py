"""Cross-layer equalization: Nagel et al., ICCV 2019, arXiv:1906.04721, section 4.1.

One scale serves many channels, and the largest of them sets it. Where channel i of a layer goes through Relu alone to
the next layer, its weights may be multiplied by s > 0 and those that read it divided by s: Relu(s x) = s Relu(x), so
the network computes the same and s makes channels alike.

Clip(x, 0, c), such as ReLU6, is not homogeneous: s Clip(x, 0, c) = Clip(s x, 0, c) only while neither x nor s x
passes c. A channel that reaches c on the calibration images keeps its scale; any other grows no further than leaves
room for values HEADROOM times the largest that was seen.
"""

from dataclasses import dataclass

import numpy
import onnx
from onnx import NodeProto, helper, numpy_helper
from torch import Tensor

from edgekit.quantize.calibrate import answers
from edgekit.quantize.scheme import Scheme

HEADROOM = 4  # unseen images pass what was seen; measured: docs/quantization.md
FURTHEST = 1e4  # a channel that hardly speaks is not blown up without end
ROUNDS, SETTLED = 20, 1e-3  # a layer between two others is scaled from both sides, in turn, until nothing moves

# What carries a channel on by itself and commutes with a positive factor; Clip does so within its bounds.
_CARRIES = ("Relu", "Clip", "MaxPool", "GlobalAveragePool", "AveragePool", "Flatten")


@dataclass(frozen=True)
class Link:
    """Two layers with a chain of channels between them.

    Attributes:
        axis, block: channel i of the first is read by `block` neighbouring places of that axis of the second's weights.
        bound: the lowest upper end of the Clips between them.
        cut: whether negative values are cut off on the way.
    """

    first: NodeProto
    second: NodeProto
    axis: int
    block: int
    bound: float
    cut: bool

    @property
    def depthwise(self) -> bool:
        return self.second.op_type == "Conv" and self.axis == 0

    def read(self, weights: numpy.ndarray, channels: int) -> numpy.ndarray:
        """The second's weights by the channel that they read: (channels, …)."""
        return numpy.moveaxis(weights, self.axis, 0).reshape(channels, -1)

    def divided(self, weights: numpy.ndarray, scale: numpy.ndarray) -> numpy.ndarray:
        shape = [1] * weights.ndim
        shape[self.axis] = -1
        return weights / scale.repeat(self.block).reshape(shape)


def links(model: onnx.ModelProto) -> list[Link]:
    """The pairs of layers in an fp32 graph that can be scaled against each other, in its order."""
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    outputs = {value.name for value in model.graph.output}
    stored = {tensor.name for tensor in model.graph.initializer}
    readers: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def owned(node: NodeProto) -> bool:
        """Its weights and its bias are constants that no other layer reads."""
        return all(name in stored and len(readers[name]) == 1 for name in node.input[1:] if name)

    found = []
    for first in model.graph.node:
        if first.op_type != "Conv" or not owned(first):
            continue
        name, bound, cut = first.output[0], numpy.inf, False
        while len(readers.get(name, [])) == 1 and name not in outputs:
            node = readers[name][0]
            if node.op_type in ("Conv", "Gemm"):
                place = _place(node, constants, len(constants[first.input[1]]))
                if node.input[0] == name and owned(node) and place:
                    found.append(Link(first, node, *place, bound, cut))
                break
            if node.op_type not in _CARRIES:
                break
            if node.op_type == "Clip":
                least, most = (constants.get(entry) for entry in [*node.input, "", ""][1:3])
                # A lower end that is not zero does not move with the channel; one that is computed is not known.
                if least is None or float(least) != 0 or (most is None and any(node.input[2:])):
                    break
                bound = min(bound, numpy.inf if most is None else float(most))
            cut = cut or node.op_type in ("Relu", "Clip")
            name = node.output[0]
    return found


def _place(node: NodeProto, constants: dict[str, numpy.ndarray], channels: int) -> tuple[int, int] | None:
    """Axis and block (see Link) of the weights by which a layer reads `channels`; None where groups share them."""
    attributes = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
    if node.input[1] not in constants:
        return None
    shape = constants[node.input[1]].shape
    if node.op_type == "Conv":
        group = attributes.get("group", 1)
        if group == 1 and shape[1] == channels:
            return 1, 1
        return (0, 1) if group == channels == shape[0] and shape[1] == 1 else None
    axis = 1 if attributes.get("transB", 0) else 0
    return None if shape[axis] % channels else (axis, shape[axis] // channels)


def equalize(model: onnx.ModelProto, images: Tensor, scheme: Scheme) -> onnx.ModelProto:
    """A graph that answers `images` (N, C, H, W) as `model` does, with channels that share their scales better.

    By tensor, what is made alike are the channels of two layers' weights (equation 11 of the paper). By channel each
    output has a scale of its own already: there the channels of the activation between them, whose range is one, are
    made alike, as far as the weights that read them stay so too.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    pairs = links(made)
    tensors = {tensor.name: tensor for tensor in made.graph.initializer}
    names = {name for link in pairs for name in (*link.first.input[1:], *link.second.input[1:]) if name}
    weights = {name: numpy_helper.to_array(tensors[name]).astype(numpy.float64) for name in names}
    peaks = _peaks(made, pairs, images)
    for _ in range(ROUNDS):
        moved = 0.0
        for link, peak in zip(pairs, peaks, strict=True):
            scale = _scale(link, weights, peak, scheme)
            for name in filter(None, link.first.input[1:]):
                weights[name] *= scale.reshape(-1, *[1] * (weights[name].ndim - 1))
            weights[link.second.input[1]] = link.divided(weights[link.second.input[1]], scale)
            peak *= scale
            moved = max(moved, float(numpy.abs(numpy.log(scale)).max()))
        if moved < SETTLED:
            break
    for name, value in weights.items():
        tensors[name].CopyFrom(numpy_helper.from_array(value.astype(numpy.float32), name))
    return made


def _peaks(model: onnx.ModelProto, pairs: list[Link], images: Tensor) -> list[numpy.ndarray]:
    """The largest value (C,) of each channel between two layers; where negative values pass, of its magnitude."""
    found: dict[str, numpy.ndarray] = {}
    cut = {link.first.output[0]: link.cut for link in pairs}
    for values in answers(model, cut, images):
        for name, array in values.items():
            largest = (array if cut[name] else numpy.abs(array)).max((0, *range(2, array.ndim)))
            found[name] = numpy.maximum(found.get(name, -numpy.inf), largest.astype(numpy.float64))
    return [found[link.first.output[0]] for link in pairs]


def _scale(link: Link, weights: dict[str, numpy.ndarray], peak: numpy.ndarray, scheme: Scheme) -> numpy.ndarray:
    """By how much each channel (C,) is multiplied."""
    by_tensor = scheme.weights.granularity == "tensor"
    if not by_tensor and link.depthwise:
        return numpy.ones(len(peak))  # its channels have scales of their own: nothing to gain, as was measured
    read = numpy.abs(link.read(weights[link.second.input[1]], len(peak))).max(1)
    own = weights[link.first.input[1]]
    before = numpy.abs(own).reshape(len(own), -1).max(1) if by_tensor else numpy.minimum(peak, link.bound)
    scale = numpy.ones(len(peak))
    live = (before > 0) & (read > 0)
    scale[live] = numpy.sqrt(read[live] / before[live])
    if live.any() and not by_tensor:  # a factor common to all changes no precision, but Clip's bound does not move
        scale[live] *= before[live].max() / (before * scale)[live].max()
    if numpy.isfinite(link.bound):
        room = numpy.maximum(link.bound / (HEADROOM * numpy.maximum(peak, 1e-12)), 1)
        scale = numpy.where((peak >= link.bound) | (peak <= 0), 1, numpy.minimum(scale, room))
    return scale.clip(1 / FURTHEST, FURTHEST)
