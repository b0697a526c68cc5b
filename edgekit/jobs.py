"""What an export is to write: one job for each file, and whose student it is of."""

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import edgekit
from edgekit.console import say
from edgekit.errors import ENVIRONMENT, EdgekitError, choose
from edgekit.files import sha256
from edgekit.formats import FORMATS
from edgekit.models import Network
from edgekit.recipe import Recipe
from edgekit.runs import Run

DEFAULT_FORMATS = ("onnx", "torchscript")
# Names that CLI.md fixes for formats yet to come: whoever types one has misspelt nothing.
LATER = ()


@dataclass(frozen=True)
class Job:
    """One artifact to be written; a `trained` one goes on training (quantize/qat.py), in fp32 as the int8 one's
    control."""

    format: str
    precision: str
    label: str | None
    trained: bool = False

    @property
    def name(self) -> str:
        return "-".join(part for part in (self.format, self.precision, self.label) if part)


@dataclass(frozen=True)
class Order:
    """What was asked for, of which run; `typed`: the command that asks for the same again."""

    place: Run
    made_from: dict[str, Any]
    recipe: Recipe
    student: Network
    ptq: str
    robust_drop: float | None
    qat: bool
    typed: str
    force: bool

    def training(self, job: Job) -> dict[str, Any]:
        """What artifact.json's `qat` says, but for the outcome, where the job's file is trained further."""
        if not job.trained:
            return {}
        from edgekit.quantize import qat

        return qat.asked(self.recipe, control=job.precision == "fp32")

    def last(self, job: Job) -> dict[str, Any]:
        """The `training` of artifact.json's `robust_drop`: the search was to end with it, whether it came to that."""
        return {"training": self.training(job)} if self.qat else {}

    @property
    def input(self) -> dict[str, Any]:
        """The `input` of artifact.json."""
        channels, height, width = self.student.input_shape
        return {
            "shape": [None, channels, height, width],
            "layout": "NCHW",
            "range": [0, 1],
            "normalization": "inside",
            "resize": [height, width],
            "crop": None,
        }

    @property
    def metadata(self) -> dict[str, str]:
        """What the files themselves say."""
        return {
            "edgekit": edgekit.__version__,
            "classes": json.dumps(self.student.classes),
            "input": json.dumps(self.input),
            "outputs": "logits",
            "student_sha256": self.made_from["student_sha256"],
        }


def listed(formats: str | Sequence[str] | None, int8: bool, fp16: bool, label: str | None) -> list[Job]:
    """The jobs that the options of `export` stand for, fp32 before the other precisions of a format."""
    if label is not None and (not label or not all(letter.isalnum() or letter in "._" for letter in label)):
        raise EdgekitError("a label is made of letters, digits, '.' and '_'", where=f"--label {label}")
    wanted = ["fp32", *(["int8"] if int8 else []), *(["fp16"] if fp16 else [])]
    known = "Written: " + ", ".join(f"{one} {'/'.join(format.PRECISIONS)}" for one, format in FORMATS.items())
    if formats is None:
        if fp16:
            written = ", ".join(name for name, format in FORMATS.items() if "fp16" in format.PRECISIONS)
            raise EdgekitError(f"is for formats that have it: {written}", where="--fp16", mend="Say --format")
        jobs = [Job(format, "fp32", label) for format in DEFAULT_FORMATS]
        return [*jobs, Job("onnx", "int8", label)] if int8 else jobs
    given = formats.split(",") if isinstance(formats, str) else formats
    names = list(dict.fromkeys(stripped for name in given if (stripped := name.strip())))
    if not names:
        raise EdgekitError("no format is named", where="--format", mend=f"Known: {', '.join(FORMATS)}, all")
    if "all" in names:
        return [Job(name, precision, label) for name in _here() for precision in _written(name, wanted)]
    for name in names:
        if name in LATER:
            raise EdgekitError(f"{name} is not written by this version", where="--format", mend=known)
        choose(FORMATS, name, "format", where="--format")
        if package := _lacking(name):
            what = f"{name} needs the package {package}"
            raise EdgekitError(what, where="--format", mend=_install(name), exit_code=ENVIRONMENT)
        for precision in wanted:
            if precision not in FORMATS[name].PRECISIONS:
                raise EdgekitError(
                    f"{name} is not written in {precision} by this version", where="--format", mend=known
                )
    return [Job(name, precision, label) for name in names for precision in wanted]


def _here() -> Iterator[str]:
    """The formats that can be written here; each other one is named."""
    for name in FORMATS:
        if package := _lacking(name):
            say(f"{name} is left out: it needs the package {package}. {_install(name)}")
        else:
            yield name


def _written(name: str, wanted: Sequence[str]) -> Iterator[str]:
    """Those of the wanted precisions that a format has; each other one is named."""
    for precision in wanted:
        if precision in FORMATS[name].PRECISIONS:
            yield precision
        else:
            say(f"{name}-{precision} is left out: this version writes {name} in {'/'.join(FORMATS[name].PRECISIONS)}")


def _lacking(name: str) -> str | None:
    """A package that the format needs and that is not installed."""
    return next((package for package in FORMATS[name].PACKAGES if not find_spec(package)), None)


def _install(name: str) -> str:
    return f"Run: pip install 'edgekit[{name}]'"


def trained(jobs: Sequence[Job], label: str | None, *, control: bool) -> list[Job]:
    """The same with every int8 file trained, and its control beside it."""
    if not any(job.precision == "int8" for job in jobs):
        raise EdgekitError("what it trains is an int8 file", where="--qat", mend="Add --int8")
    made = [replace(job, label=label, trained=True) if job.precision == "int8" else job for job in jobs]
    return [*made, Job("onnx", "fp32", f"{label or 'qat'}.control", trained=True)] if control else made


def made_from(run: Run) -> dict[str, Any]:
    """The `made_from` of artifact.json: what the files of a run are made of, if that is still what run.json says."""
    info = run.info()
    if sha256(run.student) != info.get("student_sha256"):
        raise EdgekitError(
            "the student has changed since it was trained (its sha256 is not the one in run.json)", where=run.student
        )
    try:
        return {
            "run": run.folder.resolve().name,  # its own name, also where it was reached through runs/latest or "."
            "seed": info["seed"],
            "student_sha256": info["student_sha256"],
            "recipe_sha256": sha256(run.recipe_file),
            "data_sha256": info["data"]["sha256"],
        }
    except (KeyError, TypeError, FileNotFoundError):
        raise EdgekitError(
            "run.json and recipe.toml do not say what the student was trained on", where=run.folder, mend="Train again"
        ) from None


def typed(
    place: Run,
    fp16: bool,
    ptq: str,
    sensitivity: bool,
    robust_drop: float | None,
    qat: bool,
    control: bool,
    overrides: Sequence[str],
    formats: str | Sequence[str] | None,
    label: str | None,
    force: bool,
) -> str:
    """The command that asks for the same."""
    typed = ["edgekit", "export", str(place.folder), "--int8", *["--fp16"] * fp16]
    typed += [*["--qat"] * qat, *["--qat-control"] * control]
    typed += [part for override in overrides for part in ("--set", override)]
    typed += ["--ptq", ptq] if ptq != "tuned" else []
    typed += ["--sensitivity"] * sensitivity
    typed += ["--robust-drop", f"{100 * robust_drop:g}"] if robust_drop is not None else []
    typed += ["--format", formats if isinstance(formats, str) else ",".join(formats)] if formats is not None else []
    typed += ["--label", label] if label is not None else []
    return shlex.join([*typed, *["--force"] * force])
