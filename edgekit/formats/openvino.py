"""OpenVINO: `model.xml` and its weights `model.bin`, made of an ONNX graph and run on the CPU; dynamic batch, NCHW.

An int8 file is made of the QDQ graph that ONNX Runtime gets too. OpenVINO fuses it in another way, so that some sums
round to the other side: `twin.onnx` beside it is that graph, for gradients, and is no part of what ships.
"""

import collections
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edgekit import artifact
from edgekit.classifier import Classifier, Wrapped
from edgekit.errors import ENVIRONMENT, EdgekitError
from edgekit.files import sha256
from edgekit.formats import onnx
from edgekit.models import Network

if TYPE_CHECKING:
    from onnx import ModelProto

FILE, WEIGHTS = artifact.JUDGED["openvino"], artifact.WEIGHTS["openvino"]
OPENED = (FILE,)
RUNTIME = "OpenVINO"
PRECISIONS = ("fp32", "fp16", "int8")
PACKAGES = ("torch", "onnx", "onnxscript", "openvino")
SCHEME = "x86"

_SECTION, _WEIGHTS_SHA256 = "edgekit", "weights_sha256"
# Beside weights, what the runtime adds to move numbers between its layouts is no operator of the network.
_NO_OPERATORS = ("Const", "Input", "Output", "Reorder")


def write(network: Network, folder: Path, metadata: dict[str, str], precision: str = "fp32") -> None:
    """Write the student into `folder`; fp16: the weights, whatever precision they are multiplied in."""
    write_model(onnx.lower(network), folder, metadata, precision)


def write_model(model: "ModelProto", folder: Path, metadata: dict[str, str], precision: str = "fp32") -> None:
    """Write an ONNX graph as OpenVINO's, `metadata` inside.

    Args:
        precision: "fp16" stores the weights so; "int8" says that the graph is a QDQ one, which is kept beside it.
    Raises:
        EdgekitError: OpenVINO does not take the graph; (exit code 4) it is not installed.
    """
    openvino = package()
    with tempfile.TemporaryDirectory() as scratch:
        onnx.write_model(model, Path(scratch), metadata)
        try:
            made = openvino.convert_model(Path(scratch) / onnx.FILE)
        except RuntimeError as error:
            raise EdgekitError(f"OpenVINO does not take this graph ({_said(error)})") from None
        _rename(made)
        for key, value in sorted(metadata.items()):
            made.set_rt_info(value, [_SECTION, key])
        half, path = precision == "fp16", Path(scratch) / FILE
        openvino.save_model(made, path, compress_to_fp16=half)
        # The digest of the .xml is that of the file: let it stand for the weights too.
        made.set_rt_info(sha256(path.with_name(WEIGHTS)), [_SECTION, _WEIGHTS_SHA256])
        openvino.save_model(made, path, compress_to_fp16=half)
        # By way of another folder: OpenVINO's own writer has no error of its own for a full disk.
        for name in (FILE, WEIGHTS):
            (folder / name).write_bytes(path.with_name(name).read_bytes())
        if precision == "int8":
            (folder / artifact.TWIN).write_bytes(path.with_name(onnx.FILE).read_bytes())


def open(path: Path, *, threads: int | None = None) -> Classifier:
    """The file in OpenVINO on the CPU, in this process.

    Args:
        threads: of one inference; None is the runtime's own choice.
    Returns:
        Classifier: (N, C, H, W) float32 in [0, 1] on any device -> (N, K) float32 logits there; no gradients.
    Raises:
        EdgekitError: OpenVINO does not take the file, or its weights are others; (exit code 4) it is not installed.
    """
    openvino = package()
    # Float products in float32: processors with AMX would take bfloat16 by themselves.
    options = {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 1}
    options |= {} if threads is None else {"INFERENCE_NUM_THREADS": threads}
    compiled = _compiled(openvino, path, options)
    request, output = compiled.create_infer_request(), compiled.output(0)
    wanted = [_size(each) for each in compiled.input(0).get_partial_shape()]

    def run(images: Tensor) -> Tensor:
        pixels = images.detach().to("cpu", torch.float32).contiguous().numpy()
        if not len(pixels):
            return images.new_zeros(0, output.get_partial_shape()[1].get_length(), dtype=torch.float32)
        if list(pixels.shape[1:]) != wanted[1:]:  # OpenVINO would compute something
            raise EdgekitError(f"takes images of the shape {wanted}, not {list(pixels.shape)}", where=path)
        try:
            # A copy: the next inference overwrites the runtime's own memory.
            return torch.from_numpy(request.infer([pixels])[output].copy()).to(images.device)
        except RuntimeError as error:
            raise EdgekitError(f"OpenVINO does not take such images ({_said(error)})", where=path) from None

    return Wrapped(run, differentiable=False)


def describe(path: Path) -> dict[str, Any]:
    """What the file itself holds: operators by precision, bytes of both files, input, metadata.

    Raises:
        EdgekitError: OpenVINO does not take the file; (exit code 4) it is not installed.
    """
    model = _read(package(), path)
    operators: dict[str, collections.Counter[str]] = {"int8": collections.Counter(), "float": collections.Counter()}
    constant: set[str] = set()
    for node in model.get_ordered_ops():
        kind, sources = node.get_type_name(), [value.get_node() for value in node.input_values()]
        if kind == "Constant" or (sources and constant.issuperset(each.get_friendly_name() for each in sources)):
            constant.add(node.get_friendly_name())  # computed once, when the file is loaded
        elif kind not in ("FakeQuantize", "Parameter", "Result"):
            whole = any(each.get_type_name() == "FakeQuantize" for each in sources[:1])
            operators["int8" if whole else "float"][kind] += 1
    (first,) = model.inputs
    return {
        "format": "openvino",
        "bytes": path.stat().st_size + path.with_suffix(".bin").stat().st_size,
        "operators": {precision: dict(sorted(count.items())) for precision, count in operators.items() if count},
        "input": {"name": first.get_any_name(), "shape": [_size(each) for each in first.get_partial_shape()]},
        "metadata": {key: value for key, value in _metadata(model).items() if key != _WEIGHTS_SHA256},
    }


def running(path: Path) -> dict[str, Any]:
    """What OpenVINO makes of the file on this processor, read from the graph that it has compiled.

    Returns:
        {"int8": number of operators on integers, "float": {operator: number of those on floats}}.
    """
    graph = _compiled(package(), path, {"INFERENCE_PRECISION_HINT": "f32"}).get_runtime_model()
    count, floats = 0, collections.Counter[str]()
    constant: set[str] = set()
    for node in graph.get_ordered_ops():
        about = {key: str(value.astype(str)) for key, value in node.get_rt_info().items() if hasattr(value, "astype")}
        kind, precision = about.get("layerType") or str(node.get_type_name()), about.get("runtimePrecision")
        sources = [value.get_node().get_friendly_name() for value in node.input_values()]
        if kind == "Const" or (sources and constant.issuperset(sources)):
            constant.add(node.get_friendly_name())  # computed once
        elif kind not in _NO_OPERATORS:
            if precision in ("u8", "i8"):
                count += 1
            else:
                floats[kind] += 1
    return {"int8": count, "float": dict(sorted(floats.items()))}


def _rename(model: Any) -> None:
    """Number what the converter has named by a counter of its process: two exports shall be the same bytes."""
    for number, node in enumerate(model.get_ordered_ops()):
        if re.fullmatch(r"[A-Za-z]+_\d+", node.get_friendly_name()):
            node.set_friendly_name(f"{node.get_type_name()}_{number}")


def package() -> Any:
    """The package itself.

    Raises:
        EdgekitError: (exit code 4) it is not installed.
    """
    try:
        import openvino  # pyright: ignore
    except ImportError:
        raise EdgekitError(
            "the package openvino is not installed",
            where="OpenVINO",
            mend="Run: pip install 'edgekit[openvino]'",
            exit_code=ENVIRONMENT,
        ) from None
    return openvino


def _read(openvino: Any, path: Path) -> Any:
    weights = path.with_suffix(".bin")
    for each in (path, weights):
        if not each.is_file():
            raise EdgekitError("there is no such file", where=each)
    with path.open("rb") as file:  # OpenVINO goes by what is inside, and would take an ONNX file for its own
        if not file.read(64).lstrip().startswith(b"<"):
            raise EdgekitError("not an OpenVINO file", where=path)
    try:
        model = openvino.Core().read_model(path)
        expected = _metadata(model).get(_WEIGHTS_SHA256)
    except RuntimeError as error:
        raise EdgekitError(f"OpenVINO does not take the file ({_said(error)})", where=path) from None
    if expected is not None and expected != sha256(weights):
        raise EdgekitError(f"these are not the weights that {path.name} was written with", where=weights)
    return model


def _compiled(openvino: Any, path: Path, options: dict[str, Any]) -> Any:
    model = _read(openvino, path)
    try:
        return openvino.Core().compile_model(model, "CPU", options)
    except RuntimeError as error:
        raise EdgekitError(f"OpenVINO does not take the file ({_said(error)})", where=path) from None


def _metadata(model: Any) -> dict[str, str]:
    if not model.has_rt_info([_SECTION]):
        return {}
    section = model.get_rt_info([_SECTION]).value
    return {key: str(getattr(value, "value", value)) for key, value in sorted(section.items())}


def _size(dimension: Any) -> int | str:
    return "batch" if dimension.is_dynamic else dimension.get_length()


def _said(error: Exception) -> str:
    """The last line that says something: OpenVINO begins with the place in its own sources."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__
