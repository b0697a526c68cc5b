"""TorchScript: `model.pt`, frozen, which is judged; `model.ptl`, the same for PyTorch Mobile's lite interpreter.

Upstream is retiring both; they are here for the apps that load them today. Loading either runs code of the file:
only files are opened whose digest an artifact.json vouches for, or whose user says so (--trust-file).
"""

import io
import json
import warnings
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgekit.classifier import Classifier, Wrapped
from edgekit.errors import EdgekitError, choose
from edgekit.models import Network

FILE, LITE = "model.pt", "model.ptl"
OPENED = (FILE, LITE)
RUNTIME = "torch"
PRECISIONS = ("fp32",)
PACKAGES = ("torch",)
_EXTRA = "edgekit/"  # where the metadata stands among the archive's extra files


def write(network: Network, folder: Path, metadata: dict[str, str], precision: str = "fp32") -> None:
    """Write both files into `folder`; `metadata` travels in each as extra files of the archive."""
    extra = {f"{_EXTRA}{key}": value for key, value in metadata.items()}
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        frozen = torch.jit.freeze(torch.jit.trace(network.eval(), torch.zeros(2, *network.input_shape)))
        torch.jit.save(frozen, buffer, _extra_files=extra)
        lite = frozen._save_to_buffer_for_lite_interpreter(_extra_files=extra)
    # Through memory: where the disk is full torch's own writer of files ends the process, past any except clause.
    (folder / FILE).write_bytes(buffer.getvalue())
    (folder / LITE).write_bytes(lite)


def open(path: Path, *, threads: int | None = None, output: str | None = None) -> Classifier:
    """The file in torch's own interpreter: `.ptl` in the lite one.

    Args:
        threads: not used; the interpreter works with the threads of torch itself (torch.set_num_threads).
        output: which of several outputs holds the scores: the key of a dict, the place in a tuple.
    Returns:
        Classifier: (N, C, H, W) float32 in [0, 1] on any device -> (N, K) float32 logits there; no gradients here.
    Raises:
        EdgekitError: torch does not take the file, or it answers with what are no scores.
    """
    module = load(path)

    def run(images: Tensor) -> Tensor:
        given = images.detach().to("cpu", torch.float32).contiguous()
        with torch.no_grad():
            return scores(module(given), output, len(given)).to(images.device)

    return Wrapped(run, differentiable=False)


def load(path: Path) -> Any:
    """The module itself, in eval mode; code of the file may run.

    Raises:
        EdgekitError: torch does not take the file.
    """
    lite = path.suffix == ".ptl"
    if lite:
        from torch.jit.mobile import _load_for_lite_interpreter as opener
    else:
        opener = torch.jit.load
    module: Any
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = opener(str(path), map_location="cpu")
    except (RuntimeError, ValueError) as error:
        raise _refused(path, error) from None
    return module if lite else module.eval()


def scores(answered: Any, output: str | None, count: int) -> Tensor:
    """What a module answered to `count` images, as (N, K) float32.

    Raises:
        EdgekitError: which of several outputs is meant is not said, or it is no scores.
    """
    named = {"0": answered} if isinstance(answered, Tensor) else {}
    if isinstance(answered, tuple | list):
        named = {str(place): each for place, each in enumerate(answered)}
    elif isinstance(answered, dict):
        named = {str(name): each for name, each in answered.items()}
    named = {name: each for name, each in named.items() if isinstance(each, Tensor)}
    if output is None and len(named) != 1:
        known = ", ".join(f"'{name}'" for name in named) or "no tensor"
        raise EdgekitError(f"which of its outputs holds the scores is not said (it has {known})", mend="Say --output")
    found = next(iter(named.values())) if output is None else choose(named, output, "output")
    if found.ndim < 2 or len(found) != count:
        raise EdgekitError(f"answers scores of shape {tuple(found.shape)} to {count} images")
    return found.flatten(1).float()


def describe(path: Path) -> dict[str, Any]:
    """What the file itself holds: operators by precision, bytes, input, metadata.

    Raises:
        EdgekitError: torch does not take the file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            marked = {name: name.partition(f"/extra/{_EXTRA}")[2] for name in archive.namelist()}
            metadata = {key: archive.read(name).decode() for name, key in sorted(marked.items()) if key}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = torch.jit.load(path, map_location="cpu").inlined_graph
    except (RuntimeError, ValueError, zipfile.BadZipFile) as error:
        raise _refused(path, error) from None
    operators = Counter(node.kind() for node in graph.nodes() if node.kind().startswith("aten::"))
    # A frozen trace takes any shape; which one the network was made for only the metadata knows.
    shape = json.loads(metadata.get("input", "{}")).get("shape")
    name = [value.debugName() for value in graph.inputs()][-1].partition(".")[0]  # "images.1": a number is torch's own
    return {
        "format": "torchscript",
        "bytes": path.stat().st_size,
        "operators": {"float": dict(sorted(operators.items()))},
        "input": {"name": name, "shape": shape},
        "metadata": metadata,
    }


def _refused(path: Path, error: Exception) -> EdgekitError:
    return EdgekitError(f"torch does not take the file ({str(error).splitlines()[0][:200]})", where=path)
