"""Graphs whose weights are trained: the folded float one, and the int8 one that rounds as its file does.

Both are read by the twin, so that no second description of a network is needed, and what is trained is the file itself:
integers in, integers out, one rounding where the kernel rounds. Gradients go straight through every rounding and stop
where a value was clipped (twin/integers.py). Batch normalization is folded and so is frozen: Jacob et al., CVPR 2018,
arXiv:1712.05877; Krishnamoorthi 2018, arXiv:1806.08342, section 3.2.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy
import onnx
import torch
from onnx import ModelProto, NodeProto, helper, numpy_helper
from torch import Tensor, nn

from edgekit import twin
from edgekit.models import Network
from edgekit.quantize.qdq import Quantized
from edgekit.twin import Twin
from edgekit.twin.integers import Grid, Round, Value

_WEIGHTED = ("Conv", "Gemm")
_INT32 = 2.0**31


class Folded(Network):
    """An fp32 graph whose convolutions and matrix products are trained; a differentiable Classifier.

    Args:
        source: fp32, its batch normalization folded; its weights are where training begins.
        like: the student that it was made of.
        graph: what answers, in the place of `source`.
    """

    def __init__(self, source: ModelProto, like: Network, graph: ModelProto | None = None) -> None:
        mean, std = (value.flatten().tolist() for value in (like.mean, like.std))
        super().__init__(_read(graph or source), like.spec, like.classes, like.input_shape, mean, std)
        self.source = source
        held = {tensor.name: numpy_helper.to_array(tensor) for tensor in source.graph.initializer}
        layers = [node for node in source.graph.node if node.op_type in _WEIGHTED]
        self.names = list(dict.fromkeys(name for node in layers for name in node.input[1:] if name in held))
        self.weights = nn.ParameterList(torch.from_numpy(held[name].copy()) for name in self.names)

    @property
    def graph(self) -> Twin:
        return cast(Twin, self.body)

    def values(self) -> dict[str, Value]:
        """What stands in the place of the graph's constants."""
        return dict(zip(self.names, self.weights, strict=True))

    def forward(self, images: Tensor) -> Tensor:
        return self.graph.answer(images, self.values())

    def model(self) -> ModelProto:
        """`source` with the weights of this moment."""
        return _holding(self.source, {name: _array(value) for name, value in Folded.values(self).items()})


@dataclass(frozen=True)
class _Layer:
    """A layer of integers: names in the file's graph, and of the float constants in `source` that it rounds."""

    activation: str  # the name of the scale of its input
    weight: str
    bias: str | None
    weight_from: str
    bias_from: str | None
    transposed: bool
    largest: int  # the integers that the file uses: 64 where pairs of products must not saturate


class FakeQuantized(Folded):
    """The int8 graph with float weights behind its integers; answers as the file that `model` writes of it.

    Args:
        made: its ranges are kept until `measure`. Training begins at the float weights, where they round to the
            integers of the file, else at these.
    """

    def __init__(self, made: Quantized, like: Network) -> None:
        super().__init__(made.source, like, made.model)
        self.file = made.model
        self.layers = self._layers()
        found = self._grids(self.graph)
        self.grids = list(found)
        for place, value in enumerate(found.values()):
            self.register_buffer(f"grid{place}", value.clone())
        with torch.no_grad():
            self._begin_at_the_file()

    def _layers(self) -> list[_Layer]:
        sources: dict[str, NodeProto] = {node.output[0]: node for node in self.source.graph.node}
        scales = {step.outputs[0]: step.inputs[1] for step in self.graph.steps if step.type == "DequantizeLinear"}
        layers = []
        for step in self.graph.steps:
            if step.type not in _WEIGHTED or not isinstance(weight := self.graph.constants[step.inputs[1]], Grid):
                continue
            node = sources[step.outputs[0]]
            transposed = node.op_type == "Gemm" and not any(
                entry.name == "transB" and helper.get_attribute_value(entry) for entry in node.attribute
            )
            biased = len(step.inputs) > 2
            layers.append(
                _Layer(
                    activation=scales[step.inputs[0]],
                    weight=step.inputs[1],
                    bias=step.inputs[2] if biased else None,
                    weight_from=node.input[1],
                    bias_from=node.input[2] if biased else None,
                    transposed=transposed,
                    largest=int(weight.centred.abs().max()),
                )
            )
        return layers

    def _grids(self, graph: Twin) -> dict[str, Tensor]:
        """Scales and zero points of the activations, and the scales of the weights."""
        found: dict[str, Tensor] = {}
        for step in graph.steps:
            if step.type in ("QuantizeLinear", "DequantizeLinear"):
                found |= {name: graph.constants[name] for name in step.inputs[1:]}
        return found | {layer.weight: graph.constants[layer.weight].scale for layer in self.layers}

    @torch.no_grad()
    def measure(self, made: Quantized) -> None:
        """Take over the ranges of another quantization of the same graph."""
        fresh = self._grids(_read(made.model))
        for place, name in enumerate(self.grids):
            self.get_buffer(f"grid{place}").copy_(fresh[name])

    def values(self) -> dict[str, Value]:
        held = super().values()
        grids = {name: self.get_buffer(f"grid{place}") for place, name in enumerate(self.grids)}
        made = held | grids
        for layer in self.layers:
            weight, scale = held[layer.weight_from], grids[layer.weight]
            made[layer.weight] = self._on(layer.weight, weight.T if layer.transposed else weight, scale, layer.largest)
            if layer.bias is not None and layer.bias_from is not None:
                # In float64 and by a float32 product of scales, as the file's integers are made (qdq.py).
                products = grids[layer.activation] * scale.flatten()
                made[layer.bias] = self._on(layer.bias, held[layer.bias_from].double(), products, _INT32)
        return made

    def _on(self, name: str, value: Tensor, scale: Tensor, largest: float) -> Grid:
        """The constant `name` of the graph with the integers that `value` rounds to."""
        wide = scale.to(value.dtype)
        centred: Tensor = Round.apply(value, wide, -largest, largest - (largest == _INT32), True)  # pyright: ignore
        return replace(self.graph.constants[name], centred=centred, scale=scale)

    def _begin_at_the_file(self) -> None:
        held, rounded = super().values(), self.values()
        for layer in self.layers:
            for name, source in ((layer.weight, layer.weight_from), (layer.bias, layer.bias_from)):
                if name is None or source is None:
                    continue
                stored, made = self.graph.constants[name], rounded[name]
                back = layer.transposed and name == layer.weight
                value = held[source].T if back else held[source]
                value = torch.where(made.centred == stored.centred, value, stored.real())
                held[source].copy_(value.T if back else value)

    @torch.no_grad()
    def model(self) -> ModelProto:
        """The int8 file of this moment."""
        values = self.values()
        stored = {name: _array(value) for name, value in values.items() if isinstance(value, Tensor)}
        read = {node.output[0]: node for node in self.file.graph.node if node.op_type == "DequantizeLinear"}
        for name, value in values.items():
            if isinstance(value, Grid):
                integers, scale = read[name].input[:2]
                stored |= {integers: _array(value.centred), scale: _array(value.scale)}
        return _holding(self.file, stored)


def _read(model: ModelProto) -> Twin:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model, path)
        return twin.open(path)


def _array(value: Tensor) -> numpy.ndarray:
    return value.detach().cpu().contiguous().numpy()


def _holding(model: ModelProto, values: Mapping[str, numpy.ndarray]) -> ModelProto:
    """`model` with other constants of the same shapes and types."""
    made = ModelProto()
    made.CopyFrom(model)
    for tensor in made.graph.initializer:
        if tensor.name in values:
            before = numpy_helper.to_array(tensor)
            value = values[tensor.name].astype(before.dtype).reshape(before.shape)
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return made
