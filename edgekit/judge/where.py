"""The words for where a file was judged."""

import contextlib
import functools
import importlib.metadata
from typing import Any

from edgekit import machine

RUNTIME = {
    "onnx": "onnxruntime",
    "torchscript": "torch",
    "openvino": "openvino",
    "executorch": "executorch",
    "litert": "ai-edge-litert",
    "ncnn": "ncnn",
    "tensorrt": "tensorrt",
    "coreml": "coremltools",
}


@functools.cache
def runtime(format: str) -> str:
    """Such as "onnxruntime 1.32.0"; the name alone where it is an extra that is not installed."""
    try:
        return f"{RUNTIME[format]} {importlib.metadata.version(RUNTIME[format])}"
    except importlib.metadata.PackageNotFoundError:
        return RUNTIME[format]


def judged_on(format: str) -> str:
    """Such as "x86 avx512_vnni, onnxruntime 1.32.0": what a verdict holds for."""
    return f"{machine.family()} {machine.int8_instructions()}, {runtime(format)}"


def machine_block() -> dict[str, Any]:
    """The `machine` of verify --json."""
    runtimes: dict[str, str] = {}
    for name in sorted(set(RUNTIME.values())):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # an extra that is not installed
            runtimes[name] = importlib.metadata.version(name)
    return {"cpu": machine.processor(), "int8_instructions": machine.int8_instructions(), "runtimes": runtimes}
