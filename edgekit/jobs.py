"""What an export is to write: one job for each file, and whose student it is of."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import edgekit
from edgekit.errors import EdgekitError, choose
from edgekit.files import sha256
from edgekit.formats import FORMATS
from edgekit.models import Network
from edgekit.recipe import Recipe
from edgekit.runs import Run

DEFAULT_FORMATS = ("onnx", "torchscript")
# What a format can be written in; further ones come with their own modules.
PRECISIONS = {"onnx": ("fp32", "int8"), "torchscript": ("fp32",)}
# Names that CLI.md fixes for formats yet to come: whoever types one has misspelt nothing.
LATER = ("tensorrt", "executorch", "litert", "openvino", "ncnn", "coreml")


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
    if formats is None:
        if fp16:
            raise EdgekitError("no format is written in fp16 by this version", where="--fp16", mend="Use --int8")
        jobs = [Job(format, "fp32", label) for format in DEFAULT_FORMATS]
        return [*jobs, Job("onnx", "int8", label)] if int8 else jobs
    given = formats.split(",") if isinstance(formats, str) else formats
    names = list(dict.fromkeys(stripped for name in given if (stripped := name.strip())))
    if not names:
        raise EdgekitError("no format is named", where="--format", mend=f"Known: {', '.join(FORMATS)}, all")
    if "all" in names:
        names = list(FORMATS)
    wanted = ["fp32", *(["int8"] if int8 else []), *(["fp16"] if fp16 else [])]
    known = "Written: " + ", ".join(f"{one} {'/'.join(kinds)}" for one, kinds in PRECISIONS.items())
    for name in names:
        if name in LATER:
            raise EdgekitError(f"{name} is not written by this version", where="--format", mend=known)
        choose(FORMATS, name, "format", where="--format")
        for precision in wanted:
            if precision not in PRECISIONS[name]:
                raise EdgekitError(
                    f"{name} is not written in {precision} by this version", where="--format", mend=known
                )
    return [Job(name, precision, label) for name in names for precision in wanted]


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
    typed = ["edgekit", "export", str(place.folder), "--int8", *["--qat"] * qat, *["--qat-control"] * control]
    typed += [part for override in overrides for part in ("--set", override)]
    typed += ["--ptq", ptq] if ptq != "tuned" else []
    typed += ["--sensitivity"] * sensitivity
    typed += ["--robust-drop", f"{100 * robust_drop:g}"] if robust_drop is not None else []
    typed += ["--format", formats if isinstance(formats, str) else ",".join(formats)] if formats is not None else []
    typed += ["--label", label] if label is not None else []
    return shlex.join([*typed, *["--force"] * force])
