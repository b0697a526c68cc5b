"""Deployable formats, one file each.

A format has: write(network, folder, metadata, precision); write_model, the same from an ONNX graph, where it takes one;
open(path) -> Classifier; describe(path); running(path), where it has int8 files. FILE is what is judged, OPENED are all
that open by themselves, RUNTIME is what runs them, PRECISIONS are what it writes, PACKAGES what it needs, and
SCHEME the one of quantize.SCHEMES that its int8 files are made in; BATCH, where a file does not take any number of
images at once, how many at most. One whose files not every machine that writes them
can run has lacking(): what this machine lacks, None where it lacks nothing; its writer checks what it has written.
"""

import struct
from pathlib import Path
from types import ModuleType
from typing import Any

from edgekit.errors import EdgekitError
from edgekit.formats import coreml, executorch, litert, ncnn, onnx, openvino, tensorrt, torchscript

FORMATS: dict[str, ModuleType] = {
    "onnx": onnx,
    "torchscript": torchscript,
    "openvino": openvino,
    "executorch": executorch,
    "litert": litert,
    "ncnn": ncnn,
    "tensorrt": tensorrt,
    "coreml": coreml,
}


def describe(name: str, path: Path) -> dict[str, Any]:
    """What a file itself holds, as its format's own describe() says it.

    Raises:
        EdgekitError: it is no such file, or one that its reader stumbles over.
    """
    try:
        return FORMATS[name].describe(path)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError, struct.error) as error:
        # Lengths, kinds and offsets of a damaged file are anything; no reader asks for every one of them.
        raise EdgekitError(f"not a whole {name} file ({type(error).__name__}: {error})"[:300], where=path) from None


def lacking(name: str) -> str | None:
    """What this machine lacks to run files of a format, such as "a GPU that CUDA can use"; None where they run here."""
    format = FORMATS[name]
    return format.lacking() if hasattr(format, "lacking") else None
