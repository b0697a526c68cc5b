"""Core ML: `model.mlpackage`, an ML program for iOS 17 and macOS 14, written anywhere, run by Apple's systems alone.

The program is built operator by operator from edgekit's ONNX graph, with none of coremltools' own passes over it: what
stands in the package is what the graph says. It takes one image at a time, since programs with a batch of any size are
kept off the Neural Engine; `open` asks for one after the other. fp16 and int8 compute in float16, as that engine does.
int8: activations between `quantize` and `dequantize`, weights behind `constexpr_affine_dequantize`; scales and biases
are rounded to float16 first, in `twin.onnx` beside it too. https://apple.github.io/coremltools/docs-guides/
"""

import contextlib
import importlib
import io
import json
import logging
import math
import platform
import re
import shutil
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor

from edgekit import artifact
from edgekit.classifier import Classifier, Wrapped
from edgekit.errors import ENVIRONMENT, EdgekitError
from edgekit.files import sha256
from edgekit.formats import onnx
from edgekit.formats.half import halved
from edgekit.models import Network

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

FILE, WEIGHTS = artifact.JUDGED["coreml"], artifact.WEIGHTS["coreml"]
OPENED = (FILE,)
RUNTIME = "Core ML"
PRECISIONS = ("fp32", "fp16", "int8")
PACKAGES = ("torch", "onnx", "onnxscript", "coremltools")
SCHEME = "symmetric"
BATCH = 1  # image at once

_WEIGHTS_SHA256, _OWN = "weights_sha256", "com.github.apple.coremltools."
_IDENTITY = uuid.UUID("7e2d1b1e-6f0c-4f6a-9d5b-6f2f4a3d9c10")  # edgekit's own, from which its packages' are made
_KINDS = {10: numpy.float16, 11: numpy.float32, 21: numpy.int8, 23: numpy.int32, 1: numpy.bool_}  # of MIL.proto
_BLOB, _SENTINEL = numpy.dtype([("sentinel", "<u4"), ("kind", "<u4"), ("bytes", "<u8"), ("at", "<u8")]), 0xDEADBEEF


@dataclass(frozen=True)
class Operation:
    """One operator of a program: its inputs by name, an array where constant, else the name of who makes it."""

    kind: str
    output: str
    inputs: dict[str, Any]


@dataclass(frozen=True)
class Package:
    """What a package says: its program in order, its metadata, and its input and output, name and shape."""

    operations: list[Operation]
    metadata: dict[str, str]
    input: tuple[str, list[int]]
    output: tuple[str, list[int]]


def lacking() -> str | None:
    """What this machine lacks to run a package."""
    return None if platform.system() == "Darwin" else "macOS"


def write(network: Network, folder: Path, metadata: dict[str, str], precision: str = "fp32") -> None:
    """Write the student's package into `folder`; fp16: weights and products, float32 image and logits."""
    write_model(onnx.lower(network), folder, metadata, precision)


def write_model(model: "ModelProto", folder: Path, metadata: dict[str, str], precision: str = "fp32") -> None:
    """Write an ONNX graph as a package, `metadata` inside, and see that the package holds what the graph does.

    Args:
        precision: "fp16" halves the graph; "int8" says that it is a QDQ one, which is kept beside it as it was written.
    Raises:
        EdgekitError: the graph has an operator that is not written; (exit code 4) coremltools is not installed.
    """
    package()
    if precision == "int8":
        model = short(model)
        onnx.write_model(model, folder, metadata)
        (folder / onnx.FILE).rename(folder / artifact.TWIN)
    given = Written(model if precision == "fp32" else halved(model))
    with _quiet():
        spec, weights = given.converted()
    for key in [key for key in spec.description.metadata.userDefined if key.startswith(_OWN)]:
        del spec.description.metadata.userDefined[key]  # among them the day
    path, beside = folder / FILE, folder / WEIGHTS
    beside.parent.mkdir(parents=True)
    beside.write_bytes(weights)
    # The digest of the program is that of the package: let it stand for the weights too.
    for key, value in {**metadata, _WEIGHTS_SHA256: sha256(beside)}.items():
        spec.description.metadata.userDefined[key] = value
    path.write_bytes(spec.SerializeToString(deterministic=True))
    _write_manifest(path)
    made = read(path)
    found = {one.output: one for one in made.operations}
    for name, constants in given.constants.items():
        for key, value in constants.items():
            kept = found[name].inputs.get(key) if name in found else None
            if not isinstance(kept, numpy.ndarray) or not numpy.array_equal(kept, value) or kept.dtype != value.dtype:
                raise EdgekitError(f"coremltools has not kept the {key} of {name} as it was given", where=RUNTIME)


def short(model: "ModelProto") -> "ModelProto":
    """The QDQ graph with float biases and scales that float16 holds."""
    from onnx import TensorProto, numpy_helper

    from edgekit.formats.tensorrt import float_biases

    made = float_biases(model)
    for tensor in made.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT:
            continue
        value = numpy_helper.to_array(tensor)
        with numpy.errstate(over="ignore"):
            rounded = value.astype(numpy.float16).astype(numpy.float32)
        if value.ndim and not numpy.isfinite(rounded).all():
            raise EdgekitError(f"a number of {tensor.name} is larger than float16 can hold", where=RUNTIME)
        if tensor.name.endswith("_scale") and not rounded.all():
            raise EdgekitError(f"{tensor.name} is smaller than float16 can hold", where=RUNTIME)
        if numpy.isfinite(rounded).all():
            tensor.CopyFrom(numpy_helper.from_array(rounded, tensor.name))
    return made


class Written:
    """An ONNX graph as a MIL program.

    Attributes:
        constants: of each operator by its name, the constant inputs that it was given.
    """

    def __init__(self, model: "ModelProto") -> None:
        from onnx import numpy_helper

        self.model = model
        self.arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        self.values: dict[str, Any] = dict(self.arrays)
        self.constants: dict[str, dict[str, numpy.ndarray]] = {}
        self.builder = importlib.import_module("coremltools.converters.mil").Builder

    def converted(self) -> tuple[Any, bytes]:
        """The specification (Model.proto) and the file of weights."""
        library = package()
        mil = importlib.import_module("coremltools.converters.mil.mil")
        image = self.model.graph.input[0]
        shape = tuple(size.dim_value or 1 for size in image.type.tensor_type.shape.dim)
        place = self.builder.placeholder(shape=shape)
        with mil.Function({_plain(image.name): place}, opset_version=library.target.iOS17) as function:
            function.set_outputs([self._made(function.inputs[_plain(image.name)])])
        program = mil.Program()
        program.add_function("main", function)
        made = library.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=library.target.iOS17,
            compute_precision=library.precision.FLOAT32,  # as the graph has it: nothing is cast besides
            pass_pipeline=library.PassPipeline.EMPTY,
            skip_model_load=True,
        )
        try:
            weights = Path(made.weights_dir) / Path(WEIGHTS).name
            return made.get_spec(), weights.read_bytes()
        finally:
            shutil.rmtree(made.package_path, ignore_errors=True)  # else it is left to the end of the process

    def _made(self, image: Any) -> Any:
        self.values[self.model.graph.input[0].name] = image
        for node in self.model.graph.node:
            if node.op_type not in _OPERATORS:
                raise EdgekitError(f"{node.op_type} is not written for Core ML by this version", where=RUNTIME)
            self.values[node.output[0]] = _OPERATORS[node.op_type](self, node)
        return self.values[self.model.graph.output[0].name]

    def add(self, kind: str, node: "NodeProto", **inputs: Any) -> Any:
        """Append an operator that is named after what it makes."""
        name = _plain(node.output[0])
        kept = {key: value for key, value in inputs.items() if isinstance(value, numpy.ndarray | numpy.generic)}
        self.constants[name] = {key: numpy.asarray(value) for key, value in kept.items()}
        return getattr(self.builder, kind)(name=name, **inputs)


def _plain(name: str) -> str:
    """A name as MIL allows it."""
    return re.sub(r"\W|^(?=\d)", "_", name)


# Operators ------------------------------------------------------------------------------------------------------------


def _attributes(node: "NodeProto") -> dict[str, Any]:
    from onnx import helper

    return {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}


def _pads(about: dict[str, Any]) -> list[int]:
    """ONNX: all begins, then all ends; MIL: begin and end of each axis."""
    if about.get("auto_pad", b"NOTSET") != b"NOTSET":
        raise EdgekitError("padding that is not said in numbers is not written for Core ML", where=RUNTIME)
    top, left, bottom, right = about.get("pads", [0, 0, 0, 0])
    return [top, bottom, left, right]


def _pair(first: str, second: str, kind: str) -> Callable[[Written, "NodeProto"], Any]:
    def written(graph: Written, node: "NodeProto") -> Any:
        a, b = (graph.values[name] for name in node.input)
        return graph.add(kind, node, **{first: a, second: b})

    return written


def _conv(graph: Written, node: "NodeProto") -> Any:
    about = _attributes(node)
    x, weight, *bias = (graph.values[name] for name in node.input if name)
    return graph.add(
        "conv",
        node,
        x=x,
        weight=weight,
        **({"bias": bias[0]} if bias else {}),
        strides=about.get("strides", [1, 1]),
        dilations=about.get("dilations", [1, 1]),
        groups=about.get("group", 1),
        pad_type="custom",
        pad=_pads(about),
    )


def _gemm(graph: Written, node: "NodeProto") -> Any:
    about = _attributes(node)
    x, weight, *bias = (graph.values[name] for name in node.input if name)
    if about.get("transA", 0) or about.get("alpha", 1.0) != 1 or about.get("beta", 1.0) != 1:
        raise EdgekitError("a Gemm that does more than multiply and add is not written for Core ML", where=RUNTIME)
    if not about.get("transB", 0):
        if not isinstance(weight, numpy.ndarray):
            raise EdgekitError("a Gemm whose weights are computed is not written for Core ML", where=RUNTIME)
        weight = numpy.ascontiguousarray(weight.T)
    return graph.add("linear", node, x=x, weight=weight, **({"bias": bias[0]} if bias else {}))


def _clip(graph: Written, node: "NodeProto") -> Any:
    x, *bounds = (graph.values[name] if name else None for name in node.input)
    low, high = (*bounds, None, None)[:2]
    if low is not None and high is None:
        return graph.add("relu", node, x=x) if float(low) == 0 else graph.add("maximum", node, x=x, y=low)
    if low is None or high is None:
        raise EdgekitError("a Clip without a lower end is not written for Core ML", where=RUNTIME)
    return graph.add("clip", node, x=x, alpha=low[()], beta=high[()])


def _mean(graph: Written, node: "NodeProto") -> Any:
    about = _attributes(node)
    pooled = node.op_type == "GlobalAveragePool"
    if not pooled and len(node.input) < 2:
        raise EdgekitError("a ReduceMean without axes as an input is not written for Core ML", where=RUNTIME)
    axes = [2, 3] if pooled else graph.arrays[node.input[1]].tolist()
    keep = pooled or bool(about.get("keepdims", 1))
    return graph.add("reduce_mean", node, x=graph.values[node.input[0]], axes=axes, keep_dims=keep)


def _flatten(graph: Written, node: "NodeProto") -> Any:
    x = graph.values[node.input[0]]
    if _attributes(node).get("axis", 1) != 1:
        raise EdgekitError("a Flatten that mixes images is not written for Core ML", where=RUNTIME)
    return graph.add("reshape", node, x=x, shape=[1, math.prod(x.shape[1:])])


def _reshape(graph: Written, node: "NodeProto") -> Any:
    x, asked = graph.values[node.input[0]], graph.arrays.get(node.input[1])
    if asked is None:
        raise EdgekitError("a Reshape to a size that is computed is not written for Core ML", where=RUNTIME)
    copied = not _attributes(node).get("allowzero", 0)  # where a 0 stands for the size that there is
    sizes = [x.shape[place] if size == 0 and copied else size for place, size in enumerate(asked.tolist())]
    if -1 in sizes:
        sizes[sizes.index(-1)] = math.prod(x.shape) // -math.prod(sizes)
    return graph.add("reshape", node, x=x, shape=sizes)


def _max_pool(graph: Written, node: "NodeProto") -> Any:
    about = _attributes(node)
    sizes = about["kernel_shape"]
    if any(step != 1 for step in about.get("dilations", [1, 1])):
        raise EdgekitError("a MaxPool with gaps is not written for Core ML", where=RUNTIME)
    return graph.add(
        "max_pool",
        node,
        x=graph.values[node.input[0]],
        kernel_sizes=sizes,
        strides=about.get("strides", [1] * len(sizes)),
        pad_type="custom",
        pad=_pads(about),
        ceil_mode=bool(about.get("ceil_mode", 0)),
    )


def _cast(graph: Written, node: "NodeProto") -> Any:
    from onnx import TensorProto

    kind = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16"}[_attributes(node)["to"]]
    return graph.add("cast", node, x=graph.values[node.input[0]], dtype=kind)


def _quantize(graph: Written, node: "NodeProto") -> Any:
    x, scale = (graph.values[name] for name in node.input[:2])
    _zero(graph, node)
    return graph.add("quantize", node, input=x, scale=scale[()], output_dtype="int8")


def _dequantize(graph: Written, node: "NodeProto") -> Any:
    x, scale = (graph.values[name] for name in node.input[:2])
    _zero(graph, node)
    if not isinstance(x, numpy.ndarray):
        return graph.add("dequantize", node, input=x, scale=scale[()])
    return graph.add(
        "constexpr_affine_dequantize",
        node,
        quantized_data=x,
        scale=scale[()] if not scale.ndim else scale,
        zero_point=numpy.int8(0),
        axis=_attributes(node).get("axis", 0) if scale.ndim else 0,
    )


def _zero(graph: Written, node: "NodeProto") -> None:
    if len(node.input) > 2 and graph.arrays[node.input[2]].any():
        raise EdgekitError("zero points other than 0 are not written for Core ML", where=RUNTIME)


def _max(graph: Written, node: "NodeProto") -> Any:
    """With the lowest number of all it is there for ONNX Runtime alone: nothing."""
    x, least = (graph.values[name] for name in node.input)
    if float(least) == float(numpy.finfo(least.dtype).min):
        return x
    return graph.add("maximum", node, x=x, y=least)


_OPERATORS: dict[str, Callable[[Written, "NodeProto"], Any]] = {
    "Add": _pair("x", "y", "add"),
    "Cast": _cast,
    "Clip": _clip,
    "Conv": _conv,
    "DequantizeLinear": _dequantize,
    "Div": _pair("x", "y", "real_div"),
    "Flatten": _flatten,
    "Gemm": _gemm,
    "GlobalAveragePool": _mean,
    "Max": _max,
    "MaxPool": _max_pool,
    "QuantizeLinear": _quantize,
    "ReduceMean": _mean,
    "Reshape": _reshape,
    "Relu": lambda graph, node: graph.add("relu", node, x=graph.values[node.input[0]]),
    "Sub": _pair("x", "y", "sub"),
}


# The package ----------------------------------------------------------------------------------------------------------


def _write_manifest(path: Path) -> None:
    """The table of contents, with identifiers that depend on nothing: coremltools draws them."""
    places = {"Model Specification": path.name, "Model Weights": "weights"}
    entries = {
        str(uuid.uuid5(_IDENTITY, place)): {
            "author": "com.apple.CoreML",
            "description": f"CoreML {what}",
            "name": place,
            "path": f"com.apple.CoreML/{place}",
        }
        for what, place in places.items()
    }
    manifest = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": entries,
        "rootModelIdentifier": str(uuid.uuid5(_IDENTITY, path.name)),
    }
    # To the last byte as coremltools writes it: it does so again whenever it opens a package.
    text = json.dumps(manifest, indent=4, sort_keys=True) + "\n"
    (root(path) / "Manifest.json").write_text(text, encoding="utf-8")


def root(path: Path) -> Path:
    """The package that the specification lies in."""
    return path.parents[2]


def read(path: Path) -> Package:
    """Read a package that edgekit wrote, its constants included; nothing of it is run.

    Raises:
        EdgekitError: it is damaged, or no ML program of one function.
    """
    package()
    from coremltools.proto import Model_pb2  # pyright: ignore
    from google.protobuf.message import DecodeError

    weights = path.parent / "weights" / "weight.bin"
    for each in (path, weights):
        if not each.is_file():
            raise EdgekitError("there is no such file", where=each)
    spec: Any = Model_pb2.Model()
    try:
        spec.ParseFromString(path.read_bytes())
        (function,) = spec.mlProgram.functions.values()
        (block,) = function.block_specializations.values()
        (first,), (last,) = spec.description.input, spec.description.output
        metadata = dict(sorted(spec.description.metadata.userDefined.items()))
    except (DecodeError, ValueError):
        raise EdgekitError("not a Core ML program of one function, input and output", where=path) from None
    expected = metadata.pop(_WEIGHTS_SHA256, None)
    if expected is not None and expected != sha256(weights):
        raise EdgekitError(f"these are not the weights that {path.name} was written with", where=weights)
    data = weights.read_bytes()
    try:
        operations = list(_operations(block, data))
    except (ValueError, KeyError, IndexError):
        raise EdgekitError("a constant of the program is damaged", where=path) from None
    ports = [(port.name, list(port.type.multiArrayType.shape)) for port in (first, last)]
    return Package(operations, metadata, ports[0], ports[1])


def _operations(block: Any, weights: bytes) -> Iterator[Operation]:
    known: dict[str, Any] = {}
    for one in block.operations:
        inputs: dict[str, Any] = {key: _array(value, weights) for key, value in one.attributes.items() if key != "name"}
        for key, argument in one.inputs.items():
            (binding,) = argument.arguments
            value = known.get(binding.name, binding.name) if binding.HasField("name") else None
            inputs[key] = _array(binding.value, weights) if value is None else value
        output = one.outputs[0].name
        if one.type == "const":
            known[output] = inputs["val"]
        else:
            yield Operation(one.type, output, inputs)


def _array(value: Any, weights: bytes) -> Any:
    """A constant as an array; text as it is."""
    about = value.type.tensorType
    shape = [size.constant.size for size in about.dimensions]
    if value.HasField("blobFileValue"):
        at = value.blobFileValue.offset
        head = numpy.frombuffer(weights, _BLOB, 1, at)[0]
        if head["sentinel"] != _SENTINEL:
            raise ValueError(at)
        kind = numpy.dtype(_KINDS[about.dataType])
        return numpy.frombuffer(weights, kind, int(head["bytes"]) // kind.itemsize, int(head["at"])).reshape(shape)
    tensor = value.immediateValue.tensor
    field = tensor.WhichOneof("value")
    values = getattr(tensor, field).values
    if field == "strings":
        return values[0] if not shape else list(values)
    kind = _KINDS[about.dataType]
    return (numpy.frombuffer(values, kind) if field == "bytes" else numpy.array(values, kind)).reshape(shape)


# Opened ---------------------------------------------------------------------------------------------------------------


def open(path: Path, *, threads: int | None = None) -> Classifier:
    """The package in Core ML on this Mac, in this process, on whichever unit Core ML chooses.

    Args:
        threads: not used; Core ML has its own.
    Returns:
        Classifier: (N, C, H, W) float32 in [0, 1] on any device -> (N, K) float32 logits there; no gradients.
    Raises:
        EdgekitError: it is damaged, or Core ML does not take it; (exit code 4) this is no Mac.
    """
    about = read(path)
    if (missing := lacking()) is not None:
        raise EdgekitError(f"a Core ML package needs {missing}", where=path, exit_code=ENVIRONMENT)
    (image, shape), (logits, answer) = about.input, about.output
    with _quiet():
        try:
            model = package().models.MLModel(str(root(path)))
        except RuntimeError as error:
            raise EdgekitError(f"Core ML does not take the file ({str(error)[:200]})", where=path) from None

    def run(images: Tensor) -> Tensor:
        pixels = images.detach().to("cpu", torch.float32).contiguous().numpy()
        if list(pixels.shape[1:]) != shape[1:]:
            raise EdgekitError(f"takes images of the shape {shape[1:]}, not {list(pixels.shape[1:])}", where=path)
        rows = [model.predict({image: pixels[place : place + 1]})[logits] for place in range(len(pixels))]
        stacked = numpy.concatenate(rows) if rows else numpy.zeros((0, answer[-1]))
        return torch.from_numpy(stacked.astype(numpy.float32)).to(images.device)

    return Wrapped(run, differentiable=False)


def describe(path: Path) -> dict[str, Any]:
    """What the package itself holds: operators by precision, bytes, input, metadata.

    Raises:
        EdgekitError: it is damaged; (exit code 4) coremltools is not installed.
    """
    about = read(path)
    integers = {one.output for one in about.operations if one.kind == "dequantize"}
    operators: dict[str, Counter[str]] = {"int8": Counter(), "float": Counter()}
    for one in about.operations:
        if one.kind in ("quantize", "dequantize", "cast") or one.kind.startswith("constexpr"):
            continue
        source = one.inputs["x"]
        operators["int8" if isinstance(source, str) and source in integers else "float"][one.kind] += 1
    name, shape = about.input
    return {
        "format": "coreml",
        "bytes": path.stat().st_size + (path.parent / "weights" / "weight.bin").stat().st_size,
        "operators": {precision: dict(sorted(count.items())) for precision, count in operators.items() if count},
        "input": {"name": name, "shape": shape},
        "metadata": about.metadata,
        "note": "one image at a time",
    }


def running(path: Path) -> dict[str, Any]:
    """The operators of the program; where each of them runs Core ML decides when it loads it.

    Returns:
        {"int8": number of operators on integers, "float": {operator: number of those on floats}}.
    """
    operators = describe(path)["operators"]
    return {"int8": sum(operators.get("int8", {}).values()), "float": operators.get("float", {})}


def package() -> Any:
    """coremltools itself; what it says of other libraries while it is imported is kept quiet.

    Raises:
        EdgekitError: (exit code 4) it is not installed.
    """
    with _quiet():
        try:
            import coremltools  # pyright: ignore
        except ImportError:
            raise EdgekitError(
                "the package coremltools is not installed",
                where=RUNTIME,
                mend="Run: pip install 'edgekit[coreml]'",
                exit_code=ENVIRONMENT,
            ) from None
    return coremltools


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """coremltools draws bars of its passes, and warns of every library that it was not tested with."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
