"""ncnn: `model.param`, which is text, with its weights in `model.bin` beside it; one image at a time, NCHW, float32.

ncnn reads as many layers as the second line of .param announces. The metadata follow the last one, a line each, with
the digest of model.bin among them: what ncnn's own tools rewrite loses them.

Int8 files are made of a graph whose dense convolutions and matrix products alone work on integers: ncnn adds, pools and
activates floats, and is faster and more exact with depthwise convolutions of floats (quantize/scheme.py).
"""

import collections
import json
import re
import tempfile
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
from edgekit.models import Network

if TYPE_CHECKING:
    from onnx import ModelProto

FILE, WEIGHTS = "model.param", artifact.WEIGHTS["ncnn"]
OPENED = (FILE,)
RUNTIME = "ncnn"
PRECISIONS = ("fp32", "fp16", "int8")
PACKAGES = ("torch", "onnx", "onnxscript", "ncnn")
SCHEME = "layers"
BATCH = 1  # image at once
_WEIGHTS_SHA256 = "weights_sha256"
_NOTE = "# edgekit "  # no loader of ncnn's takes it for a parameter of the last layer: those are numbers
_NO_OPERATORS = ("Input", "MemoryData", "Noop", "Split")  # of these nothing is computed
_CONVERTING = ("Quantize", "Dequantize", "Requantize")
# What some processors would compute in 16 bits by themselves.
_SIXTEEN = ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_packed", "bf16_storage")
_MOST = 2**26  # bytes of a .param: it holds no weights


@dataclass(frozen=True)
class Param:
    """What a .param says.

    Attributes:
        layers: type, names of the blobs that it reads and makes, parameters by number as they are written.
        shape: (C, H, W) of the one input, None where the file leaves it open.
    """

    layers: list[tuple[str, list[str], list[str], dict[int, str]]]
    input: str
    output: str
    shape: tuple[int, int, int] | None
    metadata: dict[str, str]

    def whole(self, parameters: dict[int, str]) -> bool:
        """Whether a layer with these parameters works on integers."""
        return parameters.get(8, "0") != "0"


def write(network: Network, folder: Path, metadata: dict[str, str], precision: str = "fp32") -> None:
    """Write the student into `folder`; fp16: the weights, whatever precision they are multiplied in."""
    write_model(onnx.lower(network), folder, metadata, precision)


def write_model(model: "ModelProto", folder: Path, metadata: dict[str, str], precision: str = "fp32") -> None:
    """Write an ONNX graph as ncnn's, `metadata` inside.

    Args:
        precision: "fp16" stores the weights so; "int8" says that the graph is a QDQ one, which is kept beside it.
    Raises:
        EdgekitError: the graph has an operator that is not written.
    """
    from edgekit.formats import ncnnparam

    if precision == "int8":
        with tempfile.TemporaryDirectory() as scratch:
            onnx.write_model(model, Path(scratch), metadata)
            (folder / artifact.TWIN).write_bytes((Path(scratch) / onnx.FILE).read_bytes())
    text, weights = ncnnparam.lower(model, half=precision == "fp16")
    (folder / WEIGHTS).write_bytes(weights)
    # The digest of the .param is that of the file: let it stand for the weights too.
    notes = sorted({**metadata, _WEIGHTS_SHA256: sha256(folder / WEIGHTS)}.items())
    text += "".join(f"{_NOTE}{json.dumps({key: value})}\n" for key, value in notes)
    (folder / FILE).write_text(text, encoding="utf-8")


def open(path: Path, *, threads: int | None = None) -> Classifier:
    """The file in ncnn on the CPU, in this process; image after image.

    Args:
        threads: of one inference; None is the runtime's own choice.
    Returns:
        Classifier: (N, C, H, W) float32 in [0, 1] on any device -> (N, K) float32 logits there; no gradients.
    Raises:
        EdgekitError: ncnn does not take the file, or its weights are others; (exit code 4) it is not installed.
    """
    ncnn = package()
    about, net = read(path), ncnn.Net()
    weights = _weights(path, about)
    for name in _SIXTEEN:
        setattr(net.opt, f"use_{name}", False)
    net.opt.use_vulkan_compute = False
    if threads is not None:
        net.opt.num_threads = threads
    if net.load_param(str(path)) or net.load_model(str(weights)):
        raise EdgekitError("ncnn does not take the file", where=path)

    def one(image: numpy.ndarray) -> numpy.ndarray:
        extractor = net.create_extractor()
        # A copy: ncnn lets each channel begin at a multiple of 16 bytes.
        if extractor.input(about.input, ncnn.Mat(image).clone()):
            raise EdgekitError("ncnn does not take such images", where=path)
        failed, answer = extractor.extract(about.output)
        if failed:
            raise EdgekitError("ncnn does not get to the end of the file", where=path)
        return numpy.array(answer).reshape(-1)

    def run(images: Tensor) -> Tensor:
        pixels = images.detach().to("cpu", torch.float32).contiguous().numpy()
        if about.shape is not None and pixels.shape[1:] != about.shape:  # ncnn would compute something
            wanted = ["batch", *about.shape]
            raise EdgekitError(f"takes images of the shape {wanted}, not {list(pixels.shape)}", where=path)
        if not len(pixels):
            return images.new_zeros(0, len(json.loads(about.metadata.get("classes", "[]"))), dtype=torch.float32)
        return torch.from_numpy(numpy.stack([one(image) for image in pixels])).to(images.device)

    return Wrapped(run, differentiable=False)


def describe(path: Path) -> dict[str, Any]:
    """What the file itself holds: operators by precision, bytes of both files, input, metadata. Batch is 1: a caller
    with several images asks for one after the other.

    Raises:
        EdgekitError: it is no .param, or its weights are not beside it.
    """
    about = read(path)
    weights = _weights(path, about)
    operators: dict[str, collections.Counter[str]] = {"int8": collections.Counter(), "float": collections.Counter()}
    for kind, _, _, parameters in about.layers:
        if kind not in (*_NO_OPERATORS, *_CONVERTING):
            operators["int8" if about.whole(parameters) else "float"][kind] += 1
    return {
        "format": "ncnn",
        "bytes": path.stat().st_size + weights.stat().st_size,
        "operators": {precision: dict(sorted(count.items())) for precision, count in operators.items() if count},
        "input": {"name": about.input, "shape": None if about.shape is None else [1, *about.shape]},
        "metadata": {key: value for key, value in about.metadata.items() if key != _WEIGHTS_SHA256},
    }


def running(path: Path) -> dict[str, Any]:
    """What ncnn makes of the file, which says so itself: nothing is decided when it is loaded.

    Returns:
        {"int8": number of operators on integers, "float": {operator: number of those on floats}}.
    """
    operators = describe(path)["operators"]
    return {"int8": sum(operators.get("int8", {}).values()), "float": operators.get("float", {})}


def read(path: Path) -> Param:
    """Read a .param; ncnn itself is not asked.

    Raises:
        EdgekitError: it is none, or a damaged one.
    """
    from edgekit.formats.ncnnparam import MAGIC

    if not path.is_file():
        raise EdgekitError("there is no such file", where=path)
    with path.open("rb") as file:
        content = file.read(_MOST)
    if content.split(maxsplit=1)[:1] != [MAGIC.encode()]:
        raise EdgekitError("not a .param of ncnn's", where=path)
    try:
        return _parsed(content.decode("utf-8").splitlines())
    except (ValueError, IndexError, AttributeError):
        raise EdgekitError("a damaged .param, or one with several inputs or outputs", where=path) from None


def _parsed(lines: list[str]) -> Param:
    """Raises ValueError, IndexError or AttributeError where the lines are no .param's."""
    count, _ = (int(word) for word in lines[1].split())
    layers = [_layer(line) for line in lines[2 : 2 + count]]
    notes = [json.loads(line.removeprefix(_NOTE)) for line in lines[2 + count :] if line.startswith(_NOTE)]
    metadata = {str(key): str(value) for note in notes for key, value in note.items()}
    (first,) = [layer for layer in layers if layer[0] == "Input"]
    given = [name for layer in layers for name in layer[1]]
    made = [name for layer in layers for name in layer[2]]
    (output,) = [name for name in made if name not in given]
    # ncnn follows a blob to where it is made: one that nobody makes, or that two make or read, leads it astray.
    if len(layers) != count or not set(given) <= set(made) or len({*made}) != len(made) or len({*given}) != len(given):
        raise ValueError(f"{count} layers")
    sizes = [int(first[3].get(key, "0")) for key in (2, 1, 0)]
    shape = (sizes[0], sizes[1], sizes[2]) if all(sizes) else None
    return Param(layers, first[2][0], output, shape, dict(sorted(metadata.items())))


def _layer(line: str) -> tuple[str, list[str], list[str], dict[int, str]]:
    kind, _, reads, makes, *rest = line.split()
    bottoms, tops = int(reads), int(makes)
    named, entries = rest[: bottoms + tops], rest[bottoms + tops :]
    if len(named) != bottoms + tops or not all(re.fullmatch(r"-?\d+=\S+", entry) for entry in entries):
        raise ValueError(line)
    parameters = dict(entry.split("=", 1) for entry in entries)
    return kind, named[:bottoms], named[bottoms:], {int(key): value for key, value in parameters.items()}


def package() -> Any:
    """The package itself.

    Raises:
        EdgekitError: (exit code 4) it is not installed.
    """
    try:
        import ncnn  # pyright: ignore
    except ImportError:
        raise EdgekitError(
            "the package ncnn is not installed",
            where="ncnn",
            mend="Run: pip install 'edgekit[ncnn]'",
            exit_code=ENVIRONMENT,
        ) from None
    return ncnn


def _weights(path: Path, about: Param) -> Path:
    """The .bin of a .param, if it is the one that the file was written with."""
    weights, expected = path.with_suffix(".bin"), about.metadata.get(_WEIGHTS_SHA256)
    if not weights.is_file():
        raise EdgekitError("there is no such file", where=weights)
    if expected is not None and expected != sha256(weights):
        raise EdgekitError(f"these are not the weights that {path.name} was written with", where=weights)
    return weights
