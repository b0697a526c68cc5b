"""LiteRT (TensorFlow Lite): `model.tflite`, NCHW float32 in, logits float32 out; any batch if the network has one.

An int8 file is made of edgekit's QDQ graph: as a torch program whose weights stand between a quantize and a dequantize
on the grid that they lie on already, which is the form that LiteRT's converter folds (its own PT2E quantizer writes
it). It then stores the graph's own integers, scales and zero points. Two other ways were weighed: the quantizer of
finished files (ai_edge_quantizer) finds scales of its own for weights, and writing the flatbuffer by hand repeats the
converter's work operator by operator. Logits stay floats, and with them the last layer: 8 bits hold too few of them for
attacks that compare scores. The converter puts one transposition behind the image, all else is NHWC inside.

XNNPACK sums in 32 bits and rounds once, as ONNX Runtime does, but in other kernels: some sums fall to the other side.
`twin.onnx` beside an int8 file is the QDQ graph, for gradients, and is no part of what ships.
"""

import collections
import contextlib
import io
import json
import logging
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor, nn

from edgekit import artifact, lite
from edgekit.classifier import Classifier, Wrapped
from edgekit.errors import EdgekitError, need
from edgekit.formats import flatbuffer, onnx
from edgekit.models import Network
from edgekit.qdq_program import Program

if TYPE_CHECKING:
    from onnx import ModelProto

FILE = artifact.JUDGED["litert"]
OPENED = (FILE,)
RUNTIME = "LiteRT"
PRECISIONS = ("fp32", "fp16", "int8")
PACKAGES = ("torch", "onnx", "onnxscript", "litert_torch", "ai_edge_litert")
SCHEME = "signed"

_SECTION = "edgekit"
_CONVERTING = ("QUANTIZE", "DEQUANTIZE")
_LOW = numpy.float32(-3e38)  # below all that a layer makes, and not the lowest float32


def write(network: Network, folder: Path, metadata: dict[str, str], precision: str = "fp32") -> None:
    """Write the student into `folder`; fp16: the weights, multiplied as float32 unless the device does otherwise.

    Raises:
        EdgekitError: LiteRT does not take the network, or float16 not its weights; (exit code 4) it is not installed.
    """
    _write(network.eval(), network.input_shape, folder, metadata, precision)


def write_model(model: "ModelProto", folder: Path, metadata: dict[str, str], precision: str = "fp32") -> None:
    """Write an ONNX graph as LiteRT's; one of precision "int8" is a QDQ graph, which is kept beside it.

    Raises:
        EdgekitError: as `write`, or an operator that edgekit's graphs do not have.
    """
    _, *shape = (size.dim_value for size in model.graph.input[0].type.tensor_type.shape.dim)
    program = Program(_told(model)).eval()
    _write(_folding(program, shape) if precision == "int8" else program, shape, folder, metadata, precision)
    if precision == "int8":
        with tempfile.TemporaryDirectory() as scratch:
            onnx.write_model(model, Path(scratch), metadata)
            (folder / artifact.TWIN).write_bytes((Path(scratch) / onnx.FILE).read_bytes())


def open(path: Path, *, threads: int | None = None) -> Classifier:
    """The file in LiteRT on the CPU, in this process.

    Args:
        threads: of one inference; None is the runtime's own choice.
    Returns:
        Classifier: (N, C, H, W) float32 in [0, 1] on any device -> (N, K) float32 logits there; no gradients.
    Raises:
        EdgekitError: LiteRT does not take the file; (exit code 4) it is not installed.
    """
    session = lite.Session(path, threads=threads)

    def run(images: Tensor) -> Tensor:
        pixels = images.detach().to("cpu", torch.float32).numpy()
        return torch.from_numpy(session(pixels)).to(images.device)

    return Wrapped(run, differentiable=False)


def describe(path: Path) -> dict[str, Any]:
    """What the file itself holds: operators by precision, bytes, input, metadata.

    Raises:
        EdgekitError: it is no TFLite file, or a damaged one; (exit code 4) LiteRT is not installed.
    """
    model = _read(path)
    graph = model.subgraphs[0]
    operators: dict[str, collections.Counter[str]] = {"int8": collections.Counter(), "float": collections.Counter()}
    for node in graph.operators:
        name, whole = flatbuffer.kind(model, node), _whole(model, node)
        if whole or name not in _CONVERTING:
            operators["int8" if whole else "float"][name] += 1
    first = graph.tensors[graph.inputs[0]]
    sizes = first.shape if first.shapeSignature is None else first.shapeSignature
    shape = ["batch" if size < 0 else int(size) for size in (() if sizes is None else sizes)]
    return {
        "format": "litert",
        "bytes": path.stat().st_size,
        "operators": {precision: dict(sorted(count.items())) for precision, count in operators.items() if count},
        "input": {"name": first.name.decode(errors="replace"), "shape": shape},
        "metadata": dict(flatbuffer.fields(flatbuffer.said(model, _SECTION))),
    }


def running(path: Path) -> dict[str, Any]:
    """What LiteRT runs on integers and on floats: its kernels are those of the types that the file itself names.

    Returns:
        {"int8": number of operators on integers, "float": {operator: number of those that read or make floats}}.
    """
    model = _read(path)
    count, floats = 0, collections.Counter[str]()
    for node in model.subgraphs[0].operators:
        if _whole(model, node):
            count += 1
        else:
            floats[flatbuffer.kind(model, node)] += 1
    return {"int8": count, "float": dict(sorted(floats.items()))}


def _read(path: Path) -> Any:
    try:
        return flatbuffer.read(path.read_bytes(), path)
    except OSError as error:
        raise EdgekitError(f"cannot be read ({error.strerror})", where=path) from None


def _whole(model: Any, node: Any) -> bool:
    """Whether an operator reads and makes 8-bit integers."""
    graph, read = model.subgraphs[0], flatbuffer.inputs(node)
    places = [*read[:1], *node.outputs]
    return bool(read) and all(flatbuffer.element(graph, place) in ("INT8", "UINT8") for place in places)


def _write(module: nn.Module, shape: Any, folder: Path, metadata: dict[str, str], precision: str) -> None:
    model = flatbuffer.read(_converted(module, shape, precision == "int8"))
    flatbuffer.rename(model, "images", "logits")
    flatbuffer.say(model, _SECTION, json.dumps(metadata, sort_keys=True))
    if precision == "fp16":
        flatbuffer.halve(model)
    content = flatbuffer.written(model)
    if _resizes(content, shape):
        flatbuffer.any_batch(model)
        content = flatbuffer.written(model)
    (folder / FILE).write_bytes(content)


def _resizes(content: bytes, shape: Any) -> bool:
    """Whether the file answers two images at once as it answers each: a shape inside may be fixed to one image."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / FILE
        path.write_bytes(content)
        images = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)).numpy()
        apart = lite.Session(path, threads=1)(images)
        try:
            together = lite.Session(path, threads=1, resize=True)(images)
        except EdgekitError:
            return False
    return together.shape == apart.shape and bool(abs(together - apart).max() <= 1e-4 * max(1.0, abs(apart).max()))


def _apart(made: Any) -> None:
    """Write x as |x| * sign(x) where a float layer ends: these are operators that LiteRT's converter leaves float.

    A maximum there, a division or a power it would turn into integers, and the layer before it too.
    """
    aten = torch.ops.aten
    for node in list(made.graph.nodes):
        if node.target is not aten.maximum.default or node.args[1].op != "get_attr":
            continue
        if (made.get_buffer(node.args[1].target) == float(_LOW)).all():
            with made.graph.inserting_before(node):
                size, sign = (
                    made.graph.call_function(each, node.args[:1]) for each in (aten.abs.default, aten.sign.default)
                )
                node.replace_all_uses_with(made.graph.call_function(aten.mul.Tensor, (size, sign)))


def _told(model: "ModelProto") -> "ModelProto":
    """The same graph with two things told so that they come through to LiteRT.

    A Max with the lowest number of all, by which a layer that is to stay float is kept apart from the integers behind
    it, is none that a reader may leave out (`_apart` replaces it); a Reshape to (-1, K) is a Flatten.
    """
    from onnx import ModelProto, helper, numpy_helper

    made = ModelProto()
    made.CopyFrom(model)
    constants = {tensor.name: tensor for tensor in made.graph.initializer}
    for node in made.graph.node:
        known = [constants[name] for name in node.input[1:] if name in constants]
        if node.op_type == "Max" and known:
            value = numpy_helper.to_array(known[0])
            if value.dtype == numpy.float32 and (value == numpy.finfo(numpy.float32).min).all():
                known[0].CopyFrom(numpy_helper.from_array(numpy.maximum(value, _LOW), known[0].name))
        elif node.op_type == "Reshape" and known:
            shape = numpy_helper.to_array(known[0]).tolist()
            if len(shape) == 2 and shape[0] == -1:
                name, place, result = node.name, node.input[0], node.output[0]
                node.CopyFrom(helper.make_node("Flatten", [place], [result], name=name, axis=1))
    return made


def _converted(module: nn.Module, shape: Any, quantized: bool) -> bytes:
    """What LiteRT's converter makes of a module, as the bytes of a file for one image."""
    levels = {name: logging.getLogger(name).level for name in (None, "torch", "jax")}
    # The converter tells its progress on stdout, and what it calls natively on stderr.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), lite.quiet():
        warnings.simplefilter("ignore")
        converter = need("litert_torch", "litert")
        settings = None
        if quantized:
            quantizer = need("litert_torch.quantize.pt2e_quantizer", "litert")
            settings = need("litert_torch.quantize.quant_config", "litert").QuantConfig(
                pt2e_quantizer=quantizer.PT2EQuantizer().set_global(quantizer.get_symmetric_quantization_config())
            )
        try:
            made = converter.convert(module, (torch.zeros(1, *shape),), quant_config=settings)
            return bytes(made.model_content())
        except Exception as error:  # whatever torch, jax or MLIR raise: their classes have no common base but this
            said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise EdgekitError(f"LiteRT does not take this network ({said[:200]})") from None
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def _folding(program: nn.Module, shape: Any) -> nn.Module:
    """The same program with its int8 weights as the floats that they stand for, quantized and dequantized again.

    What LiteRT's converter folds is this pair around floats; int8 constants it would leave to be dequantized at run
    time. The floats lie on the grid, so the pair gives back the very same integers.
    """
    operators = torch.ops.quantized_decomposed
    made: Any = torch.export.export(program, (torch.zeros(1, *shape),)).module()
    for node in list(made.graph.nodes):
        if node.target is not operators.dequantize_per_channel.default or node.args[0].op != "get_attr":
            continue
        weights, scales, zeros, axis, *_, kind = node.args
        stored, scale, zero = (made.get_buffer(each.target) for each in (weights, scales, zeros))
        sizes = [-1 if place == axis else 1 for place in range(stored.ndim)]
        floats = (stored.double() - zero.double().reshape(sizes)) * scale.double().reshape(sizes)
        name = f"{weights.target.replace('.', '_')}_float"
        made.register_buffer(name, floats.float())
        with made.graph.inserting_before(node):
            given = (made.graph.get_attr(name), scales, zeros, axis, -127, 127, kind)
            again = made.graph.call_function(operators.quantize_per_channel.default, given)
        node.args = (again, scales, zeros, axis, -127, 127, kind)
    _apart(made)
    made.graph.eliminate_dead_code()
    made.recompile()
    return made
