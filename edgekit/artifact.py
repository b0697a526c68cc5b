"""The Artifact: a folder with the model file that ships and the artifact.json that describes it."""

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from edgekit.errors import EdgekitError
from edgekit.files import sha256

SCHEMA = 1
_PACKAGE = "model.mlpackage/Data/com.apple.CoreML"  # a Core ML model is a folder
# Which of an artifact's files is judged, by format: the others are the same network for another loader.
JUDGED = {
    "onnx": "model.onnx",
    "torchscript": "model.pt",
    "openvino": "model.xml",
    "executorch": "model.pte",
    "litert": "model.tflite",
    "ncnn": "model.param",
    "tensorrt": "model.engine",
    "coreml": f"{_PACKAGE}/model.mlmodel",
}
# Of formats whose judged file holds none.
WEIGHTS = {"openvino": "model.bin", "ncnn": "model.bin", "coreml": f"{_PACKAGE}/weights/weight.bin"}
TWIN = "twin.onnx"  # where an int8 file is no ONNX file: the graph it was made of, for gradients


@dataclass(frozen=True)
class Artifact:
    """An exported network on disk; `record` is its artifact.json, as CLI.md fixes it."""

    folder: Path
    record: dict[str, Any]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def format(self) -> str:
        return self.record["format"]

    @property
    def precision(self) -> str:
        return self.record["precision"]

    @property
    def path(self) -> Path:
        """The file that is judged."""
        return self.folder / JUDGED[self.format]

    @property
    def graph(self) -> Path | None:
        """The ONNX graph of an int8 file, itself or beside it."""
        if self.precision != "int8":
            return None
        return self.path if self.format == "onnx" else self.folder / TWIN

    @property
    def sha256(self) -> str:
        return next(file["sha256"] for file in self.record["files"] if file["path"] == JUDGED[self.format])

    @property
    def bytes(self) -> int:
        """Of all that has to be shipped to run it."""
        weights = WEIGHTS.get(self.format)
        return self.path.stat().st_size + ((self.folder / weights).stat().st_size if weights else 0)


def load(folder: Path) -> Artifact:
    """Read an artifact and check every file of it against its digest.

    Raises:
        EdgekitError: artifact.json is missing or damaged, or a file is missing or not the one that was exported.
    """
    path = folder / "artifact.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        files = [(folder / _inside(file["path"]), file["sha256"]) for file in record["files"]]
        known = {folder / each for each in _needed(record)} <= {file for file, _ in files}
    except FileNotFoundError:
        raise EdgekitError("there is no artifact.json", where=folder, mend="Run: edgekit export") from None
    except (ValueError, KeyError, TypeError):
        raise EdgekitError("not a valid artifact.json", where=path, mend="Run: edgekit export --force") from None
    if not known:
        raise EdgekitError("names a format or a file that edgekit does not know", where=path)
    for file, expected in files:
        if not file.is_file():
            raise EdgekitError("the file is missing", where=file, mend="Run: edgekit export --force")
        if sha256(file) != expected:
            raise EdgekitError(
                "the file has changed since it was exported (its sha256 is not the one in artifact.json)",
                where=file,
                mend="Run: edgekit export --force",
            )
    return Artifact(folder, record)


def _needed(record: dict[str, Any]) -> list[str]:
    """The files without whose digest nothing could be said of the artifact.

    Raises:
        KeyError: it is of no known format.
    """
    format = record["format"]
    beside = [TWIN] if record.get("precision") == "int8" and format != "onnx" else []
    return [JUDGED[format], *([WEIGHTS[format]] if format in WEIGHTS else []), *beside]


def _inside(path: str) -> PurePosixPath:
    """A file's place within the artifact's folder.

    Raises:
        ValueError: it leads out of it.
    """
    place = PurePosixPath(path)
    if place.is_absolute() or ".." in place.parts or "\\" in path:
        raise ValueError(path)
    return place
