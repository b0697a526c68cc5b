"""TFLite's flatbuffer as objects of its own schema: read, changed where the converter left something, written."""

import json
import struct
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy

from edgekit.errors import EdgekitError, need

IDENTIFIER = b"TFL3"
_WEIGHED = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV")  # weights are their second input
# What reading a damaged flatbuffer ends in: it holds offsets, and Python's reader follows them anywhere.
_DAMAGED = (struct.error, IndexError, KeyError, ValueError, TypeError, AttributeError, OverflowError)


def schema() -> Any:
    """The classes that LiteRT generates from TFLite's schema.

    Raises:
        EdgekitError: (exit code 4) LiteRT is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return need("ai_edge_litert.schema_py_generated", "litert")


def read(content: bytes, where: Path | None = None) -> Any:
    """The file as a ModelT.

    Raises:
        EdgekitError: it is no TFLite file, or a damaged one; (exit code 4) LiteRT is not installed.
    """
    classes = schema()
    if content[4:8] != IDENTIFIER:
        raise EdgekitError("not a TFLite file", where=where)
    try:
        model = classes.ModelT.InitFromObj(classes.Model.GetRootAs(content, 0))
        (graph, *_) = model.subgraphs
        for node in graph.operators:
            kind(model, node)
            for place in (*inputs(node), *node.outputs):
                graph.tensors[place].buffer  # noqa: B018 (that it is there)
        graph.tensors[graph.inputs[0]].name.decode()
    except _DAMAGED:
        raise EdgekitError("not a whole TFLite file", where=where) from None
    return model


def written(model: Any) -> bytes:
    """The bytes of a ModelT: data aligned to 16 bytes, as the schema asks, and equal vectors written once.

    Most of what is written once are the zero points of channels, all zeros and eight bytes each: a sixth of an int8
    file of MobileNetV2.
    """
    import flatbuffers

    class Builder(flatbuffers.Builder):
        def __init__(self) -> None:
            super().__init__(2**20)
            self._made: dict[tuple[str, bytes], int] = {}

        def CreateNumpyVector(self, x: numpy.ndarray) -> int:
            key = (x.dtype.str, x.tobytes())
            if key not in self._made:
                if x.dtype == numpy.uint8:
                    self.Prep(16, x.nbytes)
                self._made[key] = super().CreateNumpyVector(x)
            return self._made[key]

    builder = Builder()
    builder.Finish(model.Pack(builder), IDENTIFIER)
    return bytes(builder.Output())


@cache
def _names(table: str) -> dict[int, str]:
    return {code: name for name, code in vars(getattr(schema(), table)).items() if isinstance(code, int)}


def kind(model: Any, node: Any) -> str:
    """The operator's name, such as CONV_2D."""
    code = model.operatorCodes[node.opcodeIndex]
    # Files from before the field was widened have the narrow one alone.
    return _names("BuiltinOperator")[max(code.builtinCode, code.deprecatedBuiltinCode)]


def inputs(node: Any) -> list[int]:
    """The places of the tensors that an operator reads; one that is left out is -1 in the file."""
    return [int(place) for place in (() if node.inputs is None else node.inputs) if place >= 0]


def element(graph: Any, place: int) -> str:
    """The type of a tensor's elements, such as INT8."""
    return _names("TensorType")[graph.tensors[place].type]


def constant(model: Any, graph: Any, place: int) -> bool:
    return model.buffers[graph.tensors[place].buffer].data is not None


def rename(model: Any, taken: str, answered: str) -> None:
    """Name the input and the output; the other tensors after their operators, not after the modules of the sources."""
    (graph,) = model.subgraphs
    for number, node in enumerate(graph.operators):
        name = f"{kind(model, node).lower()}_{number}"
        for place, tensor in enumerate(inputs(node)):
            if constant(model, graph, tensor):
                graph.tensors[tensor].name = f"{name}/{place}".encode()
        for tensor in node.outputs:
            graph.tensors[tensor].name = name.encode()
    (first,), (last,) = graph.inputs, graph.outputs
    graph.tensors[first].name, graph.tensors[last].name = taken.encode(), answered.encode()
    for signature in model.signatureDefs or ():
        signature.inputs[0].name, signature.outputs[0].name = taken.encode(), answered.encode()


def say(model: Any, name: str, text: str) -> None:
    """Add an entry to the file's metadata."""
    classes = schema()
    buffer, entry = classes.BufferT(), classes.MetadataT()
    buffer.data = numpy.frombuffer(text.encode(), numpy.uint8)
    entry.name, entry.buffer = name.encode(), len(model.buffers)
    model.buffers.append(buffer)
    model.metadata = [*(model.metadata or ()), entry]


def said(model: Any, name: str) -> str | None:
    """An entry of the file's metadata.

    Raises:
        EdgekitError: it is no text.
    """
    for entry in model.metadata or ():
        if entry.name == name.encode():
            try:
                return bytes(model.buffers[entry.buffer].data).decode()
            except _DAMAGED:
                raise EdgekitError("its metadata are no text") from None
    return None


def any_batch(model: Any) -> None:
    """Say that the first axis of input and output has any length."""
    (graph,) = model.subgraphs
    for place in (*graph.inputs, *graph.outputs):
        tensor = graph.tensors[place]
        tensor.shapeSignature = numpy.array([-1, *tensor.shape[1:]], numpy.int32)


def halve(model: Any) -> None:
    """Store the weights as float16, each behind a DEQUANTIZE that runtimes compute once, when they load the file.

    Raises:
        EdgekitError: a weight has no finite float16.
    """
    classes, (graph,) = schema(), model.subgraphs
    places = list(dict.fromkeys(_weights(model, graph)))
    for buffer in {graph.tensors[place].buffer for place in places}:  # layers may share one
        with numpy.errstate(over="ignore"):
            half = model.buffers[buffer].data.view(numpy.float32).astype(numpy.float16)
        if not numpy.isfinite(half).all():
            raise EdgekitError("has weights that float16 cannot hold")
        model.buffers[buffer].data = half.view(numpy.uint8)
    for place in places:
        tensor, stored = graph.tensors[place], classes.TensorT()
        stored.shape, stored.type, stored.buffer = tensor.shape, classes.TensorType.FLOAT16, tensor.buffer
        stored.name, stored.hasRank = tensor.name + b"/float16", True
        tensor.buffer = 0  # none: it is computed
        graph.tensors.append(stored)
        node = classes.OperatorT()
        node.opcodeIndex, node.inputs, node.outputs = _dequantize(model), [len(graph.tensors) - 1], [place]
        graph.operators.insert(0, node)


def _weights(model: Any, graph: Any) -> Iterator[int]:
    for node in graph.operators:
        if kind(model, node) in _WEIGHED:
            place = inputs(node)[1]
            if element(graph, place) == "FLOAT32" and constant(model, graph, place):
                yield place


def _dequantize(model: Any) -> int:
    """The place of DEQUANTIZE among the file's operator codes."""
    classes = schema()
    code = classes.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = classes.BuiltinOperator.DEQUANTIZE
    code.version = 3  # the first that takes float16
    for place, known in enumerate(model.operatorCodes):
        if known.builtinCode == code.builtinCode:
            known.version = max(known.version, code.version)
            return place
    model.operatorCodes.append(code)
    return len(model.operatorCodes) - 1


def fields(text: str | None) -> Mapping[str, str]:
    """What `say` was given as JSON: text by name; nothing where there is none."""
    try:
        read = json.loads(text or "{}")
    except ValueError:
        return {}
    return {str(key): str(value) for key, value in sorted(read.items())} if isinstance(read, dict) else {}
