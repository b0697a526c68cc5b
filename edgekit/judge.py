"""An exported file -> the Classifier that runs it in its own runtime, and the words for where that was."""

import functools
import importlib.metadata
from typing import Any

from edgekit import machine
from edgekit.artifact import Artifact
from edgekit.classifier import Classifier
from edgekit.formats import FORMATS

RUNTIME = {"onnx": "onnxruntime", "torchscript": "torch"}


def open(artifact: Artifact, *, threads: int | None = None) -> Classifier:
    """The artifact as a Classifier: (N, C, H, W) float32 in [0, 1] -> (N, K) float32 logits; no gradients.

    Its digest was checked when it was loaded. The runtime works in this process.
    """
    return FORMATS[artifact.format].open(artifact.path, threads=threads)


@functools.cache
def runtime(format: str) -> str:
    """Such as "onnxruntime 1.32.0"."""
    return f"{RUNTIME[format]} {importlib.metadata.version(RUNTIME[format])}"


def judged_on(format: str) -> str:
    """Such as "x86 avx512_vnni, onnxruntime 1.32.0": what a verdict holds for."""
    return f"{machine.family()} {machine.int8_instructions()}, {runtime(format)}"


def machine_block() -> dict[str, Any]:
    """The `machine` of verify --json."""
    return {
        "cpu": machine.processor(),
        "int8_instructions": machine.int8_instructions(),
        "runtimes": {name: importlib.metadata.version(name) for name in sorted(set(RUNTIME.values()))},
    }
