"""A TorchScript file that edgekit did not write: what its archive says unopened, and, once trusted, its gradients.

TorchScript is code: loading the file may already run some of it. `archive` reads and runs nothing; all else here is for
a file whose user gave their word (--trust-file).
"""

import json
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgekit import data, foreign
from edgekit import judge as judges
from edgekit.classifier import Classifier
from edgekit.console import say
from edgekit.errors import EdgekitError, choose, nearest
from edgekit.foreign import CHANNELS, LAYOUTS, Port, Ported, Said
from edgekit.formats import torchscript
from edgekit.judge import Remote

SUFFIXES = (".pt", ".ptl", ".pth", ".torchscript")
TRUST = "Trust it: --trust-file, or export it to ONNX"
_CODE = 64 * 2**20  # bytes of code, and of metadata, that are read: a zip file can announce any number
_CALL = re.compile(r"(?<![\w.])(?:torch\.(\w+)|ops\.(\w+\.\w+))\(")
_HALF = (b"HalfStorage", b"BFloat16Storage")
_SAME = ("aten::reshape", "aten::flatten", "aten::view", "aten::squeeze", "aten::to", "aten::contiguous")
_ASKED = 2  # images that a module is asked about to see whether gradients pass


@dataclass(frozen=True)
class Archive:
    """What a TorchScript archive says without being run.

    Attributes:
        precision: int8, fp16 or fp32, by its operators and its weights.
        calls: how often its code names each operator.
        metadata: its extra files, by name.
        lite: for PyTorch Mobile's interpreter, which knows no gradients.
    """

    precision: str
    calls: dict[str, int]
    metadata: dict[str, str]
    lite: bool


def archive(path: Path) -> Archive:
    """Read the archive; nothing of it is run or unpickled.

    Raises:
        EdgekitError: there is no such file, or it is no TorchScript.
    """
    if not path.is_file():
        raise EdgekitError("there is no such file", where=path)
    if foreign.utf8(path) != str(path):
        raise EdgekitError("the name is no UTF-8", where=foreign.utf8(path), mend="Rename the file or its folder")
    mend = "Save it with torch.jit.save, or export it to ONNX"
    try:
        with zipfile.ZipFile(path) as opened:
            inside = {entry.filename.partition("/")[2]: entry for entry in opened.infolist()}
            code = [entry for name, entry in inside.items() if name.startswith("code/") and name.endswith(".py")]
            extra = {name[len("extra/") :]: entry for name, entry in inside.items() if name.startswith("extra/")}
            lite = "bytecode.pkl" in inside
            if not code and not lite:
                what = "a pickle of torch.save, not TorchScript" if "data.pkl" in inside else "not a TorchScript file"
                raise EdgekitError(what, where=path, mend=mend)
            pickles = [inside[name] for name in ("data.pkl", "constants.pkl") if name in inside]
            if sum(entry.file_size for entry in (*code, *extra.values(), *pickles)) > _CODE:
                raise EdgekitError("its code and metadata announce more than 64 MiB", where=path)
            text = "\n".join(opened.read(entry).decode() for entry in code)
            metadata = {}
            for name, entry in sorted(extra.items()):
                with suppress(UnicodeDecodeError):  # an extra file may hold anything
                    metadata[name.removeprefix("edgekit/")] = opened.read(entry).decode()
            half = any(name in opened.read(entry) for entry in pickles for name in _HALF)
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, RuntimeError) as error:
        # What zipfile raises for archives that are damaged, encrypted or packed in an unknown way.
        raise EdgekitError(f"not a TorchScript file ({foreign.first_line(error)})", where=path, mend=mend) from None
    calls = Counter(match[1] or match[2] for match in _CALL.finditer(text))
    integers = any(name.startswith("quantized.") or "quantize" in name for name in calls)
    return Archive("int8" if integers else "fp16" if half else "fp32", dict(sorted(calls.items())), metadata, lite)


def describe(path: Path) -> dict[str, Any]:
    """What `edgekit inspect` says of the file; nothing of it is run."""
    read = archive(path)
    notes = {"runs": f"nothing was run: loading TorchScript runs code of the file, `edgekit verify` wants {TRUST[10:]}"}
    if read.lite:
        notes["interpreter"] = "lite (PyTorch Mobile)"
    return {"precision": read.precision, "calls in its code": read.calls, "metadata": read.metadata, **notes}


# Once it is trusted ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Module:
    """A trusted file in its runtime.

    Attributes:
        port: how it is fed and read.    classes: K.
        open: starts it in a child process; the first call gives the one that was asked already.
    """

    port: Port
    classes: int
    open: Callable[[], Classifier]


def opened(path: Path, read: Archive, said: Said, folder: Path, threads: int) -> Module:
    """Open the file in a child process and settle how it is fed and read, from one gray image.

    Args:
        folder: the photos, whose size is taken where neither the file nor --size says one.
    Raises:
        EdgekitError: it is not trusted, takes no such image, or answers with no scores.
    """
    if not said.trust_file:
        raise EdgekitError("TorchScript is code, and where this file comes from is not known", where=path, mend=TRUST)
    port = _port(path, read.metadata, said)
    height, width = (port.height, port.width) if port.height and port.width else (said.size, said.size)
    if height is None or width is None:
        height, width = data.decode([foreign.first_photo(folder)], None).shape[2:]
    start = partial(judges.start, path, format="torchscript", threads=threads, output=said.output, trust=True)
    first: list[Remote] = []
    refusals: list[EdgekitError] = []
    for channels in (3, 1):
        mean, std = foreign.normalization(said, read.metadata, channels, path)
        asked = replace(port, channels=channels, bgr=port.bgr and channels == 3, mean=mean, std=std)
        child = start()
        try:
            answer = Ported(asked, child, differentiable=False)(torch.full((1, channels, height, width), 0.5))
        except EdgekitError as error:
            refusals.append(error)
            continue
        first.append(child)
        break
    else:
        raise refusals[0]  # what it says of an image in colours, which is the common case
    classes = answer.shape[1]
    if classes < 2:
        raise EdgekitError("it answers one value: no classifier of two or more", where=path)
    if port.names and len(port.names) != classes:
        raise EdgekitError(f"{len(port.names)} class names for its {classes} scores", where=said.classes or path)
    port = replace(asked, classes=classes, probabilities=not read.lite and _ends_in_softmax(path))
    return Module(port, classes, lambda: first.pop() if first else start())


def _port(path: Path, metadata: Mapping[str, str], said: Said) -> Port:
    """The port as far as it is known before the file was asked."""
    layout = (said.layout or metadata.get("layout", "nchw")).lower()
    if layout not in LAYOUTS:
        raise EdgekitError(f"there is no layout '{layout}'", where="--layout", mend=nearest(layout, LAYOUTS))
    order = (said.channels or metadata.get("channels", "rgb")).lower()
    choose(dict.fromkeys(CHANNELS), order, "order of channels", where="--channels")
    try:
        shape = json.loads(metadata.get("input", "{}")).get("shape", [])
        size = (int(shape[-2]), int(shape[-1])) if len(shape) in (3, 4) else None
    except (ValueError, TypeError, AttributeError):
        size = None
    return Port(
        input="images",
        output=said.output or "",
        element="float32",
        channels=3,
        height=size[0] if size else None,
        width=size[1] if size else None,
        classes=None,
        layout=layout,
        bgr=order == "bgr",
        mean=None,
        std=None,
        probabilities=False,
        names=foreign.class_names(said.classes, metadata),
    )


def _graph(path: Path) -> Any:
    """The frozen graph of the module: its weights are constants in it, and its input is the second of its inputs."""
    module = torchscript.load(path)
    with suppress(RuntimeError), warnings.catch_warnings():  # it was saved frozen
        warnings.simplefilter("ignore")
        # Without numerics: a convolution that swallows its normalization answers otherwise in the last bits.
        module = torch.jit.freeze(module, optimize_numerics=False)
    return module.graph.copy()


def _ends_in_softmax(path: Path) -> bool:
    """Whether a softmax, and after it nothing that computes, ends the module."""
    return _softmax(torchscript.load(path).inlined_graph) is not None


def _softmax(graph: Any) -> Any:
    """The node of that softmax; None where there is none, or several outputs."""
    outputs = list(graph.outputs())
    node = outputs[0].node() if len(outputs) == 1 else None
    while node is not None and node.kind() in _SAME:
        node = node.inputsAt(0).node()
    return node if node is not None and node.kind() == "aten::softmax" else None


def gradients(path: Path, port: Port, images: Tensor) -> Classifier | None:
    """The module itself, in this process, as a source of gradients; None, and said so, where none pass through it.

    Args:
        images: (N, C, H, W) float32 in [0, 1], of which the first two are asked about.
    """
    module = torchscript.load(path)
    for parameter in module.parameters():
        parameter.requires_grad_(False)

    def raw(given: Tensor) -> Tensor:
        return torchscript.scores(module(given), port.output or None, len(given))

    source = Ported(port, raw, differentiable=True)
    if port.probabilities and (cut := _without_softmax(path)) is not None:
        # Saturated probabilities have no gradient; the numbers before the softmax have one.
        source = Ported(
            replace(port, probabilities=False), lambda given: cut(given).flatten(1).float(), differentiable=True
        )
    x = images[:_ASKED].clone().requires_grad_()
    try:
        answered = source(x)
        if answered.requires_grad:
            torch.autograd.grad(answered.logsumexp(1).sum(), x)
            return source
        why = "its operators have no gradients"
    except RuntimeError as error:
        why = foreign.first_line(error)
    say(f"{path}: no gradients pass through the file ({why}): attacks must follow the scores, or a --source")
    return None


def _without_softmax(path: Path) -> Callable[[Tensor], Tensor] | None:
    """The module up to its final softmax; None where that is no node of the outermost graph."""
    graph = _graph(path)
    node = _softmax(graph)
    if node is None:
        return None
    graph.eraseOutput(0)
    graph.registerOutput(node.inputsAt(0))
    try:
        graph.eraseInput(0)  # the module: nothing is left in it that the graph would read
        return torch._C._create_function_from_graph("scores", graph)
    except RuntimeError:  # something is: the logarithms of the probabilities must do
        return None
