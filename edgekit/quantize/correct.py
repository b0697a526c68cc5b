"""Bias correction: Nagel et al., ICCV 2019, arXiv:1906.04721, section 4.2, the empirical way.

Rounded weights and activations move the mean of what a layer computes. The shift of each output channel, over the
calibration images and all pixels, is measured and taken out of the bias: layer after layer, so that each is measured
behind layers that are corrected already.
"""

import numpy
import onnx
from onnx import NodeProto, helper, numpy_helper
from torch import Tensor

from edgekit.quantize.calibrate import answers, opened

IMAGES = 256  # at most: a mean over so many images and all their pixels is known well enough
NUMBERS = 2**26  # float32 values of one tensor that are held at once, at most


def correct(model: onnx.ModelProto, quantized: onnx.ModelProto, images: Tensor) -> onnx.ModelProto:
    """The QDQ graph `quantized` of the fp32 graph `model`, its biases such that every layer's mean is the float one.

    Args:
        model: its layers' results have the names that they have in `quantized`.
        images: (N, C, H, W) float32; as many of them, evenly drawn, as IMAGES and NUMBERS allow.
    """
    made = onnx.ModelProto()
    made.CopyFrom(quantized)
    tensors = {tensor.name: tensor for tensor in made.graph.initializer}
    makers = {node.output[0]: node for node in made.graph.node}
    layers = [node for node in made.graph.node if node.op_type in ("Conv", "Gemm") and _bias(node, makers, tensors)]
    if not layers:
        return made
    names = [node.output[0] for node in layers]
    (shapes,) = answers(model, names, images[:1])
    largest = max(array.size for array in shapes.values())
    count = max(1, min(len(images), IMAGES, NUMBERS // largest))
    drawn = images[numpy.linspace(0, len(images) - 1, count).round().astype(int)]
    wanted = _means(model, names, drawn)
    walk = _Walk(made, drawn.contiguous().numpy())
    for node in made.graph.node:
        value = walk.step(node)
        if node.output[0] not in wanted:
            continue
        integers, scale = (tensors[name] for name in makers[node.input[2]].input[:2])
        steps = numpy_helper.to_array(scale).astype(numpy.float64)
        error = _mean(value) - wanted[node.output[0]]
        moved = numpy.rint(error / steps)
        bias = numpy_helper.to_array(integers).astype(numpy.float64) - moved
        bias = bias.clip(-(2**31), 2**31 - 1).astype(numpy.int32)
        integers.CopyFrom(numpy_helper.from_array(bias, integers.name))
        value -= (moved * steps).astype(numpy.float32).reshape(-1, *[1] * (value.ndim - 2))
    return made


def _bias(node: NodeProto, makers: dict[str, NodeProto], tensors: dict[str, onnx.TensorProto]) -> bool:
    """Whether the layer's bias is a constant of integers."""
    maker = makers.get(node.input[2]) if len(node.input) > 2 else None
    return maker is not None and maker.op_type == "DequantizeLinear" and maker.input[0] in tensors


def _mean(value: numpy.ndarray) -> numpy.ndarray:
    """(C,) of a tensor (N, C, …)."""
    return value.mean((0, *range(2, value.ndim)), dtype=numpy.float64)


def _means(model: onnx.ModelProto, names: list[str], images: Tensor) -> dict[str, numpy.ndarray]:
    total: dict[str, numpy.ndarray] = {}
    for values in answers(model, names, images):
        for name, array in values.items():
            total[name] = total.get(name, 0) + _mean(array) * (len(array) / len(images))
    return total


class _Walk:
    """A graph run node by node, all images at once; what nobody reads any more is forgotten."""

    def __init__(self, model: onnx.ModelProto, images: numpy.ndarray) -> None:
        self.model = model
        self.tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        self.values = {model.graph.input[0].name: images}
        self.last = {name: node.output[0] for node in model.graph.node for name in node.input}

    def step(self, node: NodeProto) -> numpy.ndarray:
        """The first result of the next node; to write into it is to change what its readers get."""
        given = {name: self.values[name] for name in node.input if name in self.values}
        inputs = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in given.items()
        ]
        constants = [self.tensors[name] for name in dict.fromkeys(node.input) if name in self.tensors]
        outputs = [helper.make_empty_tensor_value_info(name) for name in node.output]
        graph = helper.make_graph([node], "node", inputs, outputs, constants)
        alone = helper.make_model(graph, opset_imports=self.model.opset_import, ir_version=self.model.ir_version)
        results = opened(alone).run(list(node.output), given)
        self.values.update(zip(node.output, map(numpy.asarray, results), strict=True))
        for name in given:
            if self.last[name] == node.output[0]:
                del self.values[name]
        return self.values[node.output[0]]
