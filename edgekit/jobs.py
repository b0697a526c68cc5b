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
from edgekit.target import Target
from edgekit.target import read as read_target

DEFAULT_FORMATS = ("onnx", "torchscript")


@dataclass(frozen=True)
class Job:
    """One artifact to be written; a `trained` one goes on training (quantize/qat.py), in fp32 as the int8 one's
    control. `target` is the place that it is for, where one was named."""

    format: str
    precision: str
    label: str | None
    trained: bool = False
    target: Target | None = None

    @property
    def name(self) -> str:
        place = self.target.name if self.target else None
        return "-".join(part for part in (self.format, self.precision, place, self.label) if part)


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

    def input(self, format: str) -> dict[str, Any]:
        """The `input` of artifact.json: `batch` is how many images a file takes at once, where there is a bound."""
        channels, height, width = self.student.input_shape
        most = getattr(FORMATS[format], "BATCH", None)
        return {
            "shape": [1 if most == 1 else None, channels, height, width],
            **({"batch": most} if most else {}),
            "layout": "NCHW",
            "range": [0, 1],
            "normalization": "inside",
            "resize": [height, width],
            "crop": None,
        }

    def metadata(self, format: str) -> dict[str, str]:
        """What the files themselves say."""
        return {
            "edgekit": edgekit.__version__,
            "classes": json.dumps(self.student.classes),
            "input": json.dumps(self.input(format)),
            "outputs": "logits",
            "student_sha256": self.made_from["student_sha256"],
        }


def listed(formats: str | Sequence[str] | None, int8: bool, fp16: bool, label: str | None) -> list[Job]:
    """The jobs that the options of `export` stand for, fp32 before the other precisions of a format."""
    _labelled(label)
    wanted = ["fp32", *(["int8"] if int8 else []), *(["fp16"] if fp16 else [])]
    if formats is None:
        jobs = [Job(format, "fp32", label) for format in DEFAULT_FORMATS]
        return [*jobs, *(Job("onnx", precision, label) for precision in wanted[1:])]
    given = formats.split(",") if isinstance(formats, str) else formats
    names = list(dict.fromkeys(stripped for name in given if (stripped := name.strip())))
    if not names:
        raise EdgekitError("no format is named", where="--format", mend=f"Known: {', '.join(FORMATS)}, all")
    if "all" in names:
        return [Job(name, precision, label) for name in _here() for precision in _written(name, wanted)]
    for name in names:
        _writable(name, wanted, "--format")
    return [Job(name, precision, label) for name in names for precision in wanted]


def aimed(targets: str | Sequence[str], int8: bool, fp16: bool, label: str | None, *, full: bool) -> list[Job]:
    """The jobs of `--target`, one for each profile, which says its format and precision.

    Args:
        int8, fp16: say nothing that a profile does not; they are refused where none is of that precision.
        full: an fp32 file of each format stands before, for what holds an int8 file against it.
    Raises:
        EdgekitError: a profile that is not there or is at fault, or that names what its format does not have.
    """
    _labelled(label)
    given = targets.split(",") if isinstance(targets, str) else [part for one in targets for part in one.split(",")]
    names = list(dict.fromkeys(stripped for name in given if (stripped := name.strip())))
    if not names:
        raise EdgekitError("no target is named", where="--target", mend="See: edgekit targets")
    jobs = [Job(one.format, one.precision, label, target=one) for one in map(_fitting, names)]
    for precision, asked in (("int8", int8), ("fp16", fp16)):
        if asked and not any(job.precision == precision for job in jobs):
            said = ", ".join(f"{job.target.name} {job.precision}" for job in jobs if job.target)
            what = f"the targets say their precision themselves ({said})"
            raise EdgekitError(what, where=f"--{precision}", mend="Leave it out")
    twice = {name for job in jobs if sum(other.name == (name := job.name) for other in jobs) > 1}
    if twice:
        raise EdgekitError(f"two profiles of one name would make one artifact ({twice.pop()})", where="--target")
    formats = dict.fromkeys(job.format for job in jobs if job.precision == "int8") if full else ()
    return [*(Job(format, "fp32", label) for format in formats), *jobs]


def _fitting(name: str) -> Target:
    """A profile whose format can be written here as it says."""
    target, where = read_target(name), f"--target {name}"
    _writable(target.format, [target.precision], where)
    format = FORMATS[target.format]
    schemes = getattr(format, "SCHEMES", (format.SCHEME,))
    if target.precision == "int8" and target.scheme not in schemes:
        what = (
            f"int8 files of {target.format} are in the scheme {' or '.join(map(repr, schemes))}, not {target.scheme!r}"
        )
        raise EdgekitError(what, where=where, mend="Change its key 'scheme'")
    layout = getattr(format, "LAYOUT", "NCHW")
    if target.layout != layout:
        what = f"files of {target.format} take {layout}, not {target.layout}"
        raise EdgekitError(what, where=where, mend="Change its key 'layout'")
    return target


def _labelled(label: str | None) -> None:
    if label is not None and (not label or not all(letter.isalnum() or letter in "._" for letter in label)):
        raise EdgekitError("a label is made of letters, digits, '.' and '_'", where=f"--label {label}")


def _writable(name: str, precisions: Sequence[str], where: str) -> None:
    """Refuse a format that is not written here, or not in these precisions."""
    known = "Written: " + ", ".join(f"{one} {'/'.join(format.PRECISIONS)}" for one, format in FORMATS.items())
    choose(FORMATS, name, "format", where=where)
    if package := _lacking(name):
        what = f"{name} needs the package {package}"
        raise EdgekitError(what, where=where, mend=_install(name), exit_code=ENVIRONMENT)
    for precision in precisions:
        if precision not in FORMATS[name].PRECISIONS:
            raise EdgekitError(f"{name} is not written in {precision} by this version", where=where, mend=known)


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
    return f"Run: pip install 'edgekit[{getattr(FORMATS[name], 'EXTRA', name)}]'"


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
    targets: str | Sequence[str] | None = None,
) -> str:
    """The command that asks for the same."""
    typed = ["edgekit", "export", str(place.folder), "--int8", *["--fp16"] * fp16]
    typed += [*["--qat"] * qat, *["--qat-control"] * control]
    typed += [part for override in overrides for part in ("--set", override)]
    typed += ["--ptq", ptq] if ptq != "tuned" else []
    typed += ["--sensitivity"] * sensitivity
    typed += ["--robust-drop", f"{100 * robust_drop:g}"] if robust_drop is not None else []
    typed += ["--format", formats if isinstance(formats, str) else ",".join(formats)] if formats is not None else []
    typed += ["--target", targets if isinstance(targets, str) else ",".join(targets)] if targets else []
    typed += ["--label", label] if label is not None else []
    return shlex.join([*typed, *["--force"] * force])
