"""What a model file is and how it was made: `edgekit inspect`. Nothing of the file is run."""

import json
from pathlib import Path
from typing import Any

import safetensors

from edgekit import artifact, foreign, script
from edgekit.errors import EdgekitError
from edgekit.files import sha256
from edgekit.foreign import Said
from edgekit.formats import onnx, openvino
from edgekit.runs import Run


def inspect(path: str | Path) -> dict[str, Any]:
    """All that a model file, an artifact folder or a run folder says of itself.

    Returns:
        {"path", "kind", "bytes", "sha256", …}: `kind` is "onnx", "safetensors", "torchscript", "openvino", "artifact"
        or "run". Of an ONNX file also its operators by precision, and `input` and `output` as `edgekit verify` would
        take them, or `verify` with the sentence that says what is missing.
    Raises:
        EdgekitError: there is no such file, or it is of no known kind.
    """
    path = Path(path)
    if not path.exists():
        raise EdgekitError("there is no such file", where=path)
    if path.is_dir():
        return {"path": str(path), **_folder(path)}
    about: dict[str, Any] = {"path": str(path), "bytes": path.stat().st_size, "sha256": sha256(path)}
    if path.suffix == ".safetensors":
        return about | _weights(path)
    if path.suffix in script.SUFFIXES:
        return about | {"kind": "torchscript", **script.describe(path), **_beside(path)}
    if path.name == openvino.FILE:
        return about | {"kind": "openvino", **openvino.describe(path), **_beside(path)}
    model = foreign.read(path)
    about |= {"kind": "onnx", "precision": foreign.precision(model), **onnx.describe(path), **_beside(path)}
    try:
        port = foreign.port(path, model, Said())
    except EdgekitError as error:
        return about | {"verify": str(error)}
    return about | {"takes": port.describe(), "classes": port.classes, "names": port.names}


def _folder(folder: Path) -> dict[str, Any]:
    if (folder / "artifact.json").is_file():
        return {"kind": "artifact", **artifact.load(folder).record}
    run = Run(folder)
    if not (folder / "run.json").is_file():
        raise EdgekitError("neither a run nor an artifact", where=folder)
    made = sorted(path.name for path in run.artifacts.iterdir()) if run.artifacts.is_dir() else []
    return {"kind": "run", **run.info(), "artifacts": made}


def _weights(path: Path) -> dict[str, Any]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = file.metadata() or {}
    except safetensors.SafetensorError:
        raise EdgekitError("not a valid safetensors file", where=path) from None
    count = sum(_product(shape) for shape in shapes.values())
    try:
        said = json.loads(metadata["edgekit"])
    except (KeyError, ValueError):
        said = {"metadata": metadata}
    return {"kind": "safetensors", "tensors": len(shapes), "numbers": count, **said}


def _product(shape: list[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _beside(path: Path) -> dict[str, Any]:
    """What artifact.json beside a file says of it; the file is checked against its digest."""
    if not (path.parent / "artifact.json").is_file():
        return {}
    record = artifact.load(path.parent).record
    return {key: record[key] for key in ("scheme", "made_from", "calibration", "against_float") if key in record}
