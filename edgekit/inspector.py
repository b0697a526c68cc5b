"""What a model file is and how it was made: `edgekit inspect`. Nothing of the file is run."""

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors

from edgekit import artifact, foreign, saturation, script, verdict
from edgekit.errors import EdgekitError
from edgekit.files import sha256
from edgekit.foreign import Said
from edgekit.formats import FORMATS, describe, onnx
from edgekit.runs import Run

if TYPE_CHECKING:
    from onnx import ModelProto

# Of artifact.json: how the file beside it was made. Its `operators` are those that the runtime makes of the file.
_MADE = (
    *("edgekit", "scheme", "made_from", "calibration", "in_float", "float_layers", "qat", "robust_drop"),
    *("against_float", "not_compared", "versions"),
)
_FOLDERS = ("artifact.json", "run.json")  # what these say is said of the folder that they stand in


def inspect(path: str | Path) -> dict[str, Any]:
    """All that a model file, an artifact folder, a run folder or a verdict says of itself.

    Returns:
        {"path", "kind", "bytes", "sha256", …}: `kind` is a format's name, "safetensors", "artifact", "run" or
        "verdict". Of an ONNX file also its operators by precision, `takes` as `edgekit verify` would feed and read it,
        or `verify` with the sentence that says what is missing; of an int8 one `quantization` and `saturation`.
    Raises:
        EdgekitError: there is no such file, or it is of no known kind.
    """
    path = Path(path)
    if path.name in _FOLDERS and path.is_file():
        path = path.parent
    if not path.exists():
        raise EdgekitError("there is no such file", where=path)
    if path.suffix == ".mlpackage":
        path = path.joinpath(*Path(FORMATS["coreml"].FILE).parts[1:])
    if path.is_dir():
        return {"path": str(path), **_folder(path)}
    if not path.is_file():  # a pipe or a device, which may have no end
        raise EdgekitError("not a file", where=path)
    about: dict[str, Any] = {"path": str(path), "bytes": path.stat().st_size, "sha256": sha256(path)}
    if path.suffix == ".safetensors":
        return about | _weights(path)
    if path.suffix == ".json":
        return about | {"kind": "verdict", **_verdict(path)}
    if path.suffix in script.SUFFIXES:
        return about | {"kind": "torchscript", **_script(path), **_beside(path)}
    if (kind := _kind(path)) not in (None, "onnx"):
        return about | {"kind": kind, **describe(kind, path), **_beside(path, _root(kind, path))}
    model = foreign.read(path)
    about |= {"kind": "onnx", "precision": foreign.precision(model), **onnx.describe(path)}
    # Weights that lie beside the file are as much of it as the file itself.
    about["external"] = {name: sha256(path.parent / name) for name in about["external"]} or None
    if about["precision"] == "int8":
        about |= {"quantization": _quantization(model), "saturation": _saturation(model)}
    about |= _beside(path)
    try:
        port = foreign.port(path, model, Said())
    except EdgekitError as error:
        return about | {"verify": str(error)}
    return about | {"takes": port.describe(), "classes": port.classes, "names": port.names}


def _kind(path: Path) -> str | None:
    """The format that files of this kind are of, TorchScript aside."""
    return next((name for name, format in FORMATS.items() if path.suffix == Path(format.FILE).suffix), None)


def _root(kind: str, path: Path) -> Path:
    """The folder that an artifact.json of a file would stand in: of some formats the file lies deeper."""
    return path.absolute().parents[len(Path(FORMATS[kind].FILE).parts) - 1]


def _script(path: Path) -> dict[str, Any]:
    """A TorchScript file: what it takes and answers is known where its metadata says so."""
    read = script.describe(path)
    try:
        takes = json.loads(read["metadata"].get("input", "null"))
    except ValueError:
        takes = None
    return read | {"input": takes, "output": read["metadata"].get("outputs")}


def _quantization(model: "ModelProto") -> str:
    """The form in which the file is quantized."""
    kinds = {node.op_type for node in model.graph.node}
    if any(kind.startswith("DynamicQuantize") for kind in kinds):
        return "dynamic: the ranges of activations are measured in each batch"
    if any(kind.startswith("QLinear") or kind == "QGemm" for kind in kinds):
        return "QOperator: operators of integers"
    if "QuantizeLinear" in kinds:
        return "QDQ: float operators between DequantizeLinear and QuantizeLinear, which the runtime fuses"
    return "weights alone" if "DequantizeLinear" in kinds else "operators of integers"


def _saturation(model: "ModelProto") -> dict[str, Any]:
    """Whether some image can make a sum of two 8-bit products clip where it is made in 16 bits (x86 without VNNI).

    Returns:
        {"can_saturate": None where no layer with constant 8-bit weights is found, "layers": those that were looked at,
        "unsafe_layers", "unsafe_pairs"}.
    """
    pairs = saturation.unsafe_pairs(model)
    unsafe = sum(pairs.values())
    return {
        "can_saturate": unsafe > 0 if pairs else None,
        "layers": len(pairs),
        "unsafe_layers": sum(count > 0 for count in pairs.values()),
        "unsafe_pairs": unsafe,
    }


def _folder(folder: Path) -> dict[str, Any]:
    if (folder / "artifact.json").is_file():
        return {"kind": "artifact", **artifact.load(folder).record}
    if (folder / "verdict.json").is_file():
        return {"kind": "verdict", **_verdict(folder / "verdict.json")}
    run = Run(folder)
    info = run.info()
    if not isinstance(info, dict) or not (folder / "run.json").is_file():
        raise EdgekitError("neither a run, an artifact nor a verdict", where=folder)
    made = sorted(path.name for path in run.artifacts.iterdir()) if run.artifacts.is_dir() else []
    judged = sorted(run.verdicts.glob("*/verdict.json"), key=lambda path: (len(path.parent.name), path.parent.name))
    verdicts = {path.parent.name: _verdict(path)["verdict"] for path in judged}
    return {"kind": "run", **info, "artifacts": made, "verdicts": verdicts}


def _verdict(path: Path) -> dict[str, Any]:
    """The verdict and what it was about; the document itself has all of it."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise EdgekitError("not valid JSON", where=path) from None
    verdict.from_dict(document, where=path)
    kept = ("edgekit", "verdict", "passed", "attacks", "norm", "epsilon", "samples", "seed", "data", "machine")
    of_each = ("name", "format", "precision", "sha256", "verdict", "why", "clean_accuracy", "robust_accuracy")
    return {
        **{key: document[key] for key in kept},
        "artifacts": [{key: one[key] for key in of_each if key in one} for one in document["artifacts"]],
    }


def _weights(path: Path) -> dict[str, Any]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            shapes = {name: part.get_shape() for name, part in parts.items()}
            kinds = Counter(part.get_dtype() for part in parts.values())
            metadata = file.metadata() or {}
    except safetensors.SafetensorError:
        raise EdgekitError("not a valid safetensors file", where=path) from None
    count = sum(_product(shape) for shape in shapes.values())
    try:
        said = json.loads(metadata["edgekit"])
    except (KeyError, ValueError):
        said = None
    if not isinstance(said, dict):
        said = {"metadata": metadata}
    return {"kind": "safetensors", "tensors": dict(sorted(kinds.items())), "numbers": count, **said}


def _product(shape: list[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _beside(path: Path, folder: Path | None = None) -> dict[str, Any]:
    """What artifact.json beside a file, or in `folder`, says of it; the file is checked against its digest."""
    folder = folder or path.parent
    if not (folder / "artifact.json").is_file():
        return {}
    record = artifact.load(folder).record
    if path.absolute().relative_to(folder.absolute()).as_posix() not in [
        file["path"] for file in record["files"]
    ]:  # another file there
        return {}
    running = {"in_its_runtime": record["operators"]} if "operators" in record else {}
    return {key: record[key] for key in _MADE if key in record} | running
