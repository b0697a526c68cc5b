"""Deployable formats, one file each.

A format has: write(network, folder, metadata, precision); write_model, the same from an ONNX graph, where it takes one;
open(path) -> Classifier; describe(path); running(path), where it has int8 files. FILE is what is judged, OPENED are all
that open by themselves, RUNTIME is what runs them, PRECISIONS are what it writes, PACKAGES what it needs, and
SCHEME the one of quantize.SCHEMES that its int8 files are made in.
"""

from types import ModuleType

from edgekit.formats import executorch, litert, ncnn, onnx, openvino, torchscript

FORMATS: dict[str, ModuleType] = {
    "onnx": onnx,
    "torchscript": torchscript,
    "openvino": openvino,
    "executorch": executorch,
    "litert": litert,
    "ncnn": ncnn,
}
