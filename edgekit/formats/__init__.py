"""Deployable formats, one file each.

A format has: write(network, folder, metadata, precision); write_model, the same from an ONNX graph, where it takes one;
open(path) -> Classifier; describe(path); running(path), where it has int8 files. FILE is what is judged, OPENED are all
that open by themselves, RUNTIME is what runs them, PRECISIONS are what it writes, PACKAGES what it needs, and
SCHEME the one of quantize.SCHEMES that its int8 files are made in. One whose files not every machine that writes them
can run has lacking(): what this machine lacks, None where it lacks nothing; its writer checks what it has written.
"""

from types import ModuleType

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


def lacking(name: str) -> str | None:
    """What this machine lacks to run files of a format, such as "a GPU that CUDA can use"; None where they run here."""
    format = FORMATS[name]
    return format.lacking() if hasattr(format, "lacking") else None
