"""Deployable formats, one file each: write(network, folder, metadata), open(path) -> Classifier, describe(path)."""

from types import ModuleType

from edgekit.formats import onnx, torchscript

FORMATS: dict[str, ModuleType] = {"onnx": onnx, "torchscript": torchscript}
