"""An ONNX file -> its graph as plain data: nodes in order, constants as tensors, one input, one output."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import onnx
import torch
from google.protobuf.message import DecodeError
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, inliner, numpy_helper
from torch import Tensor

from edgekit.errors import EdgekitError, choose

OPSETS = range(7, 29)  # before 7 broadcasting had other rules
LARGEST = 2**28  # values of one constant, 1 GB in float32: what announces more is not read

# Narrower kinds that torch has no arithmetic for; half precision is computed in float32, as ONNX Runtime's CPU does.
_WIDENED = {"float16": "float32", "bfloat16": "float32", "float64": "float32"}
_WIDENED |= {"int4": "int8", "uint4": "uint8", "int2": "int8", "uint2": "uint8", "uint16": "int32"}


@dataclass
class Node:
    """One operator. `memo` is where its rule keeps what it has prepared."""

    type: str
    name: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Any]
    opset: int
    where: Path
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)

    def get(self, key: str, default: Any = None) -> Any:
        return self.attributes.get(key, default)

    def error(self, what: str, mend: str | None = None) -> EdgekitError:
        return EdgekitError(f"{self.type} (node '{self.name}'): {what}", where=self.where, mend=mend)


@dataclass
class Graph:
    """`batch`: images that the file takes at once, None for any number; `kinds`: the ONNX types of constants."""

    nodes: list[Node]
    constants: dict[str, Tensor]
    kinds: dict[str, int]
    input: str
    output: str
    batch: int | None
    where: Path


def read(path: Path, output: str | None = None) -> Graph:
    """Read, check and flatten an ONNX file; functions are inlined and an If with a constant condition is resolved.

    Args:
        output: the name of the output to follow; needed where there are several.
    Raises:
        EdgekitError: no ONNX file, an invalid graph, data outside the file's folder, an operator set that is too old
            or too new, several inputs, or several outputs and none named.
    """
    model = _load(path)
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx") and entry.version not in OPSETS:
            known = f"Known: {OPSETS.start} to {OPSETS.stop - 1}"
            raise EdgekitError(f"operator set {entry.version} of ONNX is not known", where=path, mend=known)
    reader = _Reader(path, {entry.domain: entry.version for entry in model.opset_import})
    reader.take(model.graph)
    inputs = [entry for entry in model.graph.input if entry.name not in reader.constants]
    if len(inputs) != 1:
        names = ", ".join(entry.name for entry in inputs)
        raise EdgekitError(f"a classifier takes one input, this file {len(inputs)} ({names})", where=path)
    outputs = {entry.name: entry.name for entry in model.graph.output}
    if output is None and len(outputs) > 1:
        names = ", ".join(outputs)
        raise EdgekitError(f"the file has several outputs ({names})", where=path, mend="Name one with --output")
    chosen = choose(outputs, output, "output", where=path) if output is not None else next(iter(outputs))
    dims = inputs[0].type.tensor_type.shape.dim
    batch = dims[0].dim_value or None if dims else None
    nodes = list(_needed(reader.nodes, chosen))
    return Graph(nodes, reader.constants, reader.kinds, inputs[0].name, chosen, batch, path)


def _load(path: Path) -> ModelProto:
    try:
        model = onnx.load(path, load_external_data=False)
        for tensor in model.graph.initializer:
            _check_size(tensor, path)
        onnx.load_external_data_for_model(model, str(path.parent))
        for entry in (*model.graph.input, *model.graph.output):
            if entry.type.HasField("tensor_type"):  # the checker asks for shapes that no runtime needs
                entry.type.tensor_type.shape.SetInParent()
        onnx.checker.check_model(model)
        if model.functions:
            model = inliner.inline_local_functions(model)
    except DecodeError:
        raise EdgekitError("not an ONNX file", where=path) from None
    except FileNotFoundError as error:
        raise EdgekitError(f"the file {error.filename or path} is not there", where=path) from None
    except (onnx.checker.ValidationError, ValueError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EdgekitError(f"an invalid graph: {first[:300]}", where=path) from None
    if not model.graph.output or not model.graph.node:
        raise EdgekitError("not an ONNX file", where=path)
    return model


def _check_size(tensor: TensorProto, where: Path) -> None:
    if math.prod(tensor.dims) > LARGEST:
        raise EdgekitError(f"the constant '{tensor.name}' announces {math.prod(tensor.dims)} values", where=where)


class _Reader:
    """Collects nodes and constants; what lies in a branch that is always taken joins the graph around it."""

    def __init__(self, where: Path, opsets: dict[str, int]) -> None:
        self.where, self.opset = where, opsets.get("", opsets.get("ai.onnx", 1))
        self.nodes: list[Node] = []
        self.constants: dict[str, Tensor] = {}
        self.kinds: dict[str, int] = {}

    def take(self, graph: GraphProto) -> None:
        for tensor in graph.initializer:
            self._keep(tensor.name, tensor)
        if graph.sparse_initializer:
            raise EdgekitError("sparse constants are not read", where=self.where)
        for proto in graph.node:
            self._node(proto)

    def _keep(self, name: str, tensor: TensorProto) -> None:
        _check_size(tensor, self.where)
        try:
            array = numpy_helper.to_array(tensor)
        except (ValueError, TypeError) as error:
            raise EdgekitError(f"the constant '{name}' is damaged ({error})", where=self.where) from None
        kind = _WIDENED.get(array.dtype.name, array.dtype.name)
        if (
            array.dtype.name in ("float16", "bfloat16", "float32", "float64")
            or array.dtype.kind in "iub"
            or kind
            in (
                "int8",
                "uint8",
            )
        ):
            self.constants[name] = torch.from_numpy(numpy.array(array.astype(kind)))
            self.kinds[name] = tensor.data_type
        else:
            raise EdgekitError(f"the constant '{name}' is of the type {array.dtype.name}", where=self.where)

    def _node(self, proto: NodeProto) -> None:
        attributes = {entry.name: onnx.helper.get_attribute_value(entry) for entry in proto.attribute}
        attributes = {key: value.decode() if isinstance(value, bytes) else value for key, value in attributes.items()}
        if proto.op_type == "Constant":
            self._keep(proto.output[0], _constant(proto, attributes, self.where))
            return
        if proto.op_type == "If":
            self._branch(proto, attributes)
            return
        for key, value in attributes.items():
            if isinstance(value, TensorProto):
                self._keep(f"{proto.output[0]}/{key}", value)
                attributes[key] = self.constants.pop(f"{proto.output[0]}/{key}")
        name = proto.name or proto.output[0]
        inputs, outputs = list(proto.input), list(proto.output)
        if proto.op_type == "QuantizeLinear" and len(inputs) > 2 and inputs[2] in self.kinds:
            attributes["output_dtype"] = self.kinds[inputs[2]]
        domain = "" if proto.domain in ("", "ai.onnx") else f"{proto.domain}."
        type = proto.op_type if domain in ("", "com.microsoft.") else domain + proto.op_type
        self.nodes.append(Node(type, name, inputs, outputs, attributes, self.opset, self.where))

    def _branch(self, proto: NodeProto, attributes: dict[str, Any]) -> None:
        condition = self.constants.get(proto.input[0])
        if condition is None:
            raise EdgekitError(
                f"If (node '{proto.name or proto.output[0]}') depends on the input", where=self.where,
                mend="Simplify the file for a fixed input size first",
            )  # fmt: skip
        branch = attributes["then_branch" if bool(condition) else "else_branch"]
        self.take(branch)
        for inner, outer in zip(branch.output, proto.output, strict=True):
            if inner.name in self.constants:
                self.constants[outer], self.kinds[outer] = self.constants[inner.name], self.kinds[inner.name]
            else:
                self.nodes.append(Node("Identity", outer, [inner.name], [outer], {}, self.opset, self.where))


def _constant(node: NodeProto, attributes: dict[str, Any], where: Path) -> TensorProto:
    for key, value in attributes.items():
        if key == "value":
            return value
        if key in ("value_float", "value_floats", "value_int", "value_ints"):
            return numpy_helper.from_array(numpy.array(value, numpy.float32 if "float" in key else numpy.int64))
    raise EdgekitError(f"the constant '{node.output[0]}' is of a kind that is not read", where=where)


def _needed(nodes: list[Node], output: str) -> Iterable[Node]:
    """The nodes that `output` depends on, in order."""
    wanted, kept = {output}, []
    for node in reversed(nodes):
        if wanted.intersection(node.outputs):
            wanted.update(node.inputs)
            kept.append(node)
    return reversed(kept)


# What may stand between a final softmax and the output.
_CARRIERS = ("Identity", "Cast", "Dropout", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose")
_SQUASHERS = ("Softmax", "LogSoftmax", "Sigmoid", "QLinearSoftmax", "QLinearSigmoid")


def strip_softmax(graph: Graph) -> str | None:
    """Take a final Softmax, LogSoftmax or Sigmoid out of the graph: gradients vanish in it, decisions are the same.

    What quantizes its output goes with it.
    Returns:
        str | None: the operator that was taken out.
    """
    makers = {name: node for node in graph.nodes for name in node.outputs}
    name, rounders = graph.output, []
    while (node := makers.get(name)) is not None:
        if node.type in _SQUASHERS:
            quantized = node.type.startswith("QLinear")
            kind = node.type
            node.type, node.attributes = ("DequantizeLinear" if quantized else "Identity"), {}
            node.inputs = node.inputs[: 3 if quantized else 1]
            for rounder in rounders:
                rounder.type, rounder.inputs, rounder.attributes = "Identity", rounder.inputs[:1], {}
            return kind
        if node.type in ("QuantizeLinear", "DequantizeLinear"):
            rounders.append(node)
        elif node.type not in _CARRIERS:
            return None
        name = node.inputs[0]
    return None
