"""ONNX: written by torch's dynamo exporter, run by ONNX Runtime. `model.onnx`, dynamic batch, NCHW, float32."""

import collections
import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edgekit import ort
from edgekit.classifier import Classifier, Wrapped
from edgekit.errors import EdgekitError
from edgekit.formats.half import halved
from edgekit.models import Network

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, ValueInfoProto

FILE = "model.onnx"
OPENED = (FILE,)
RUNTIME = "ONNX Runtime"
PRECISIONS = ("fp32", "fp16", "int8")
PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime")
SCHEME = "x86"
_CONVERTING = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
# Operators that only move numbers: integers where they get integers.
_MOVING = ("Flatten", "Gather", "MaxPool", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")
_INTEGER = ("QGemm", "MatMulInteger", "ConvInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul")


def lower(network: Network) -> "ModelProto":
    """The network as an fp32 ONNX graph; the exporter folds batch normalization into the convolutions."""
    example = torch.zeros(2, *network.input_shape)
    noise = logging.getLogger("torch.onnx")
    level, noise.level = noise.level, logging.ERROR
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                network.eval(),
                (example,),
                dynamo=True,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                external_data=False,
                verbose=False,
            )
    finally:
        noise.level = level
    if program is None:
        raise EdgekitError("torch's ONNX exporter returned nothing for this student")
    model = program.model_proto
    # The exporter notes where in the Python sources each node came from: paths of this machine.
    for item in (
        *model.graph.node,
        *model.graph.value_info,
        *model.graph.input,
        *model.graph.output,
        model.graph,
        model,
    ):
        del item.metadata_props[:]
        item.doc_string = ""
    return model


def write(network: Network, folder: Path, metadata: dict[str, str], precision: str = "fp32") -> None:
    """Write the student into `folder`; fp16: weights and operators, between a float32 image and float32 logits."""
    model = lower(network)
    write_model(halved(model) if precision == "fp16" else model, folder, metadata, precision)


def write_model(model: "ModelProto", folder: Path, metadata: dict[str, str], precision: str = "fp32") -> None:
    """Check an ONNX graph, put `metadata` into it and write it into `folder`; its precision is the graph's own."""
    import onnx

    del model.metadata_props[:]
    onnx.helper.set_model_props(model, dict(sorted(metadata.items())))
    model.producer_name, model.producer_version = "edgekit", metadata.get("edgekit", "")
    onnx.checker.check_model(model, full_check=True)
    (folder / FILE).write_bytes(model.SerializeToString(deterministic=True))


def open(
    path: Path,
    *,
    threads: int | None = None,
    precise: bool = False,
    options: Mapping[str, str] | None = None,
    optimization: str = "all",
    output: str | None = None,
) -> Classifier:
    """The file in ONNX Runtime on the CPU, in this process.

    Args:
        threads: of one inference; None is the runtime's own choice.
        precise: 8-bit products never saturate (session.x64quantprecision), whatever the processor.
        options, optimization, output: as in ort.Session.
    Returns:
        Classifier: (N, C, H, W) float32 in [0, 1] on any device -> (N, K) float32 logits there; no gradients.
    Raises:
        EdgekitError: ONNX Runtime does not take the file.
    """
    entries = {**(ort.PRECISE if precise else {}), **(options or {})}
    session = ort.Session(path, threads=threads, options=entries, optimization=optimization, output=output)

    def run(images: Tensor) -> Tensor:
        pixels = images.detach().to("cpu", torch.float32).numpy()
        return torch.from_numpy(session(pixels)).to(images.device)

    return Wrapped(run, differentiable=False)


def describe(path: Path) -> dict[str, Any]:
    """What the file itself holds: operators by precision, bytes, input, output, producer, metadata.

    Raises:
        EdgekitError: the file is no ONNX model.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path, format="protobuf", load_external_data=False)  # whatever its suffix would mean to onnx
        first = model.graph.input[0]
    except (DecodeError, IndexError):
        raise EdgekitError("not an ONNX file", where=path) from None
    quantized = {name for node in model.graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    making = ("QuantizeLinear", "DynamicQuantizeLinear")
    integers = {node.output[0] for node in model.graph.node if node.op_type in making}
    operators: dict[str, collections.Counter[str]] = {"int8": collections.Counter(), "float": collections.Counter()}
    constant = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.input and constant.issuperset(node.input):
            constant.update(node.output)  # computed once, when the file is loaded
        elif _whole(node, integers):
            operators["int8"][node.op_type] += 1
            integers.update(node.output)
        elif node.op_type not in _CONVERTING:
            # By its first input; a node with none (a Constant) holds floats.
            operators["int8" if quantized.intersection(node.input[:1]) else "float"][node.op_type] += 1
    return {
        "format": "onnx",
        "bytes": path.stat().st_size,
        "opset": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "operators": {precision: dict(sorted(count.items())) for precision, count in operators.items() if count},
        "input": {"name": first.name, "shape": _shape(first)},
        "output": {each.name: _shape(each) for each in model.graph.output},
        "external": sorted(
            {
                entry.value
                for tensor in model.graph.initializer
                for entry in tensor.external_data
                if entry.key == "location"
            }
        ),
        "producer": f"{model.producer_name} {model.producer_version}".strip() or None,
        "metadata": {entry.key: entry.value for entry in model.metadata_props},
    }


def _shape(value: "ValueInfoProto") -> list[str | int]:
    return [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]


def _whole(node: "NodeProto", integers: set[str]) -> bool:
    """Whether the operator works on integers themselves, of which `integers` are known to be some."""
    whole = node.op_type.startswith("QLinear") or node.op_type in _INTEGER
    return whole or (node.op_type in _MOVING and not integers.isdisjoint(node.input[:1]))


def running(path: Path) -> dict[str, Any]:
    """What ONNX Runtime makes of the file on this processor, read from the graph that it has optimized.

    Returns:
        {"int8": number of operators on integers, "float": {operator: number of those that read or make floats}}.
    """
    import onnx

    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / FILE
        ort.Session(path, threads=1, optimized=made)
        nodes = onnx.load(made).graph.node
    integers: set[str] = set()
    count, floats = 0, collections.Counter[str]()
    for node in nodes:
        if _whole(node, integers):
            count += 1
            integers.update(node.output)
        else:
            floats[node.op_type] += 1
            if node.op_type == "QuantizeLinear":
                integers.update(node.output)
    return {"int8": count, "float": dict(sorted(floats.items()))}
