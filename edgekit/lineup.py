"""Which files `edgekit bench` sets side by side, and the robust accuracy that verdicts have found for each of them."""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgekit import artifact as artifacts
from edgekit import foreign, runs, verdict
from edgekit.artifact import Artifact
from edgekit.assignment import OWN_VERDICTS
from edgekit.errors import EdgekitError
from edgekit.processors import emulated
from edgekit.runs import Run
from edgekit.verdict import Accuracy


@dataclass(frozen=True)
class Setting:
    """What must be alike where two accuracies are to be compared; `data` is a sha256."""

    attacks: tuple[str, ...]
    norm: str
    epsilon: float
    grid: bool
    data: str
    samples: int
    seed: int
    processors: tuple[str, ...]

    def apart(self, other: "Setting") -> str:
        """What tells the two apart, in two words."""
        if self.data != other.data:
            return "other data"
        if (self.samples, self.seed) != (other.samples, other.seed):
            return "other samples"
        return "other processors" if replace(self, processors=other.processors) == other else "other attacks"


@dataclass(frozen=True)
class Contender:
    """One file that is to be measured.

    Attributes:
        name: as it is shown, different for each.
        what: as judge.open takes it.    path: the file itself.
        shape: of one image as the file takes it, (C, H, W) or (H, W, C).
        run: the one that it was exported from, where it lies in it.
    """

    name: str
    what: Artifact | Path
    path: Path
    format: str
    precision: str
    bytes: int
    sha256: str
    shape: tuple[int, ...]
    run: Run | None

    @property
    def verdicts(self) -> Path:
        return OWN_VERDICTS if self.run is None else self.run.verdicts

    @property
    def within(self) -> str:
        """The file's place: relative to its run where it has one."""
        return foreign.utf8(self.path if self.run is None else self.path.relative_to(self.run.folder))


@dataclass(frozen=True)
class Judged:
    """What a verdict found for one file.

    Attributes:
        path: of the verdict.json.
        against: why the accuracy is not to be set beside the others', None where it is.
    """

    accuracy: Accuracy
    setting: Setting
    verdict: str
    path: Path
    against: str | None = None


def contenders(what: Sequence[str | Path] = ()) -> list[Contender]:
    """The files that are meant, in the order in which they were named, each once.

    Args:
        what: run folders, artifact folders, ONNX files of any origin; every artifact of the latest run by default.
    Raises:
        EdgekitError: there is no such thing, it was changed since it was exported, or it is no image classifier.
    """
    found: dict[Path, Contender] = {}
    for path in [None] if not what else [Path(each) for each in what]:
        for one in _named(path):
            found.setdefault(one.path.resolve(), one)
    listed = list(found.values())
    return [replace(one, name=name) for one, name in zip(listed, _names(listed), strict=True)]


def _named(path: Path | None) -> list[Contender]:
    if path is not None and not path.exists():
        raise EdgekitError("there is no such run, artifact or file", where=path)
    if path is not None and path.is_file() and path != runs.ROOT / "latest":
        if not (path.parent / "artifact.json").is_file():
            return [_file(path)]
        path = path.parent  # a file of an artifact is that artifact
    if path is not None and (path / "artifact.json").is_file():
        return [_artifact(path, _run_of(path))]
    run = runs.find(None if path == runs.ROOT / "latest" else path)
    inside = sorted(run.artifacts.iterdir()) if run.artifacts.is_dir() else []
    folders = [folder for folder in inside if folder.is_dir() and not folder.name.startswith(".")]
    if not folders:
        mend = "Run: edgekit export" + ("" if path is None else f" {path}") + " --int8"
        raise EdgekitError("there is no exported file yet", where=run.folder, mend=mend)
    return [_artifact(folder, run) for folder in folders]


def _run_of(folder: Path) -> Run | None:
    """The run that an artifact lies in, by the path that was given as far as that says it."""
    for above in (folder, folder.resolve()):
        if above.parent.name == "artifacts" and (above.parents[1] / "run.json").is_file():
            return Run(above.parents[1])
    return None


def _artifact(folder: Path, run: Run | None) -> Contender:
    one = artifacts.load(folder if run is None else run.artifacts / folder.resolve().name)
    try:
        shape = tuple(one.record["input"]["shape"][1:])
        whole = len(shape) == 3 and all(isinstance(size, int) and size > 0 for size in shape)
        precision = one.precision
    except (KeyError, TypeError):
        raise EdgekitError(
            "says no shape of its input or no precision", where=folder / "artifact.json", mend="Export it again"
        ) from None
    if not whole:
        raise EdgekitError("takes images of any size: which to measure is not said", where=folder)
    return Contender(one.name, one, one.path, one.format, precision, one.bytes, one.sha256, shape, run)


def _file(path: Path) -> Contender:
    if path.suffix != ".onnx":
        raise EdgekitError("is no ONNX file and no artifact", where=path, mend="Name an artifact's folder, or a run's")
    model = foreign.read(path)
    beside = foreign.external(model)
    size = path.stat().st_size + sum((path.parent / name).stat().st_size for name in beside)
    shape, precision = foreign.image_shape(path, model), foreign.precision(model)
    return Contender(path.name, path, path, "onnx", precision, size, foreign.fingerprint(path, beside), shape, None)


def _names(listed: Sequence[Contender]) -> list[str]:
    """The shortest kind of name that tells all apart."""
    short = [one.name for one in listed]
    longer = [foreign.utf8(one.path) if one.run is None else f"{one.run.name}/{one.name}" for one in listed]
    longest = [foreign.utf8(one.path) for one in listed]
    kinds = [short, longer] if len({one.run.folder for one in listed if one.run}) < 2 else [longer]
    return next((names for names in kinds if len(set(names)) == len(names)), longest)


def judged(listed: Sequence[Contender]) -> tuple[list[Judged | None], Setting | None]:
    """The newest accuracy of each very file, by its sha256, and the setting under which they can be compared.

    That is the one under which most of the files were judged, of several such the newest. A file that was not judged
    under it keeps the newest accuracy that it has, and so does one whose attack failed a check; `against` says so.
    """
    known = [_verdicts(one) for one in listed]
    ages: dict[Setting, float] = {}
    for found in known:
        for setting, one in found.items():
            ages[setting] = max(ages.get(setting, 0.0), one.path.stat().st_mtime)
    common = max(ages, key=lambda setting: (sum(setting in found for found in known), ages[setting]), default=None)
    return [_chosen(found, common) for found in known], common


def _chosen(found: dict[Setting, Judged], common: Setting | None) -> Judged | None:
    if common in found:
        return found[common]
    if not found:
        return None
    newest = list(found.values())[-1]
    return replace(newest, against="other data" if common is None else newest.setting.apart(common))


def _verdicts(one: Contender) -> dict[Setting, Judged]:
    """The newest verdict on this very file under each setting, the newest of all last."""
    found: dict[Setting, Judged] = {}
    for path in sorted(one.verdicts.glob("*/verdict.json"), key=lambda path: (len(path.parent.name), path.parent.name)):
        # A damaged one proves nothing; `edgekit verify` passes over it too.
        with contextlib.suppress(EdgekitError, ValueError, OSError, RecursionError):
            document = verdict.from_dict(json.loads(path.read_text(encoding="utf-8")), where=path)
            for file in document.artifacts:
                if file.sha256 != one.sha256 or file.robust_accuracy is None:
                    continue
                drawn = document.drawn(file)
                ball = (document.attacks, document.norm, document.epsilon, document.grid)
                setting = Setting(*ball, document.data.sha256, drawn, document.seed, emulated(file.places))
                failed = [check.name for check in file.checks if not check.passed]
                found.pop(setting, None)
                found[setting] = Judged(
                    file.robust_accuracy,
                    setting,
                    file.verdict,
                    path,
                    f"the check {failed[0]} failed" if failed else None,
                )
    return found
