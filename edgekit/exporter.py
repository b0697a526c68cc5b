"""Student + formats -> artifacts, each opened again in its own runtime and compared before it is called written."""

import contextlib
import dataclasses
import importlib.metadata
import json
import platform
import shlex
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import edgekit
from edgekit import artifact as artifacts
from edgekit import data, judge, machine, models, quantize, runs
from edgekit.artifact import Artifact
from edgekit.classifier import Classifier, predict
from edgekit.console import progress, say
from edgekit.errors import EdgekitError, choose
from edgekit.files import sha256, write_json, writing_folder
from edgekit.formats import FORMATS, onnx
from edgekit.models import Network
from edgekit.recipe import Recipe, read, split_override
from edgekit.runs import Run

if TYPE_CHECKING:
    from edgekit.quantize.qat import Learnt

DEFAULT_FORMATS = ("onnx", "torchscript")
# What a format can be written in; further ones come with their own modules.
PRECISIONS = {"onnx": ("fp32", "int8"), "torchscript": ("fp32",)}
# Names that CLI.md fixes for formats yet to come: whoever types one has misspelt nothing.
LATER = ("tensorrt", "executorch", "litert", "openvino", "ncnn", "coreml")
COMPARED = 1000  # validation images at most
AGREES = 0.99  # an fp32 file that decides otherwise on more than 1 % of the images is not the student


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


def export(
    run: str | Path | None = None,
    *,
    int8: bool = False,
    fp16: bool = False,
    formats: str | Sequence[str] | None = None,
    qat: bool = False,
    qat_control: bool = False,
    overrides: str | Sequence[str] = (),
    label: str | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Write the deployable files of a run's student into its artifacts/ folder.

    Args:
        run: a run folder; the latest by default.
        int8: with `formats`, this precision is added to fp32 in every format named; without, onnx-int8 is added.
        fp16: refused: no format of this version writes it.
        formats: names of FORMATS, also as one string with commas; "all" is every one of them.
        qat: train the int8 file further (quantize/qat.py), under the label "qat" where no other is given; what was
            interrupted continues.
        qat_control: train the float student in the same way too, for comparison: onnx-fp32-<label>.control.
        overrides: of the recipe's table [qat], such as "qat.epochs=4".
        label: the last part of the artifacts' names.
        force: replace what stands under the same name.
    Returns:
        {"run", "artifacts": [{"name", "written", artifact.json's content…}], "latency": […]}: what `--json` prints;
            `latency` (int8 against fp32) only where a file was written.
    Raises:
        EdgekitError: no finished run, a format or precision that is not there, another artifact under the same name,
            or a file that does not answer as the student does.
        KeyboardInterrupt: training was interrupted; after one line that says how to continue.
    """
    jobs = _jobs(formats, int8, fp16, label)
    listed = (overrides,) if isinstance(overrides, str) else tuple(overrides)
    if qat:
        jobs = _trained(jobs, label, control=qat_control)
    elif qat_control or listed:
        raise EdgekitError("says how --qat trains", where=_option(qat_control, listed), mend="Add --qat")
    place = runs.find(run)
    torch.set_flush_denormal(True)
    made_from = _made_from(place)
    recipe = read(place.recipe_file, listed)
    if wrong := [override for override in listed if split_override(override)[0][0] != "qat"]:
        raise EdgekitError(
            "the student is trained already; only keys of the table [qat] can be set", where=f"--set {wrong[0]}"
        )
    student = models.load(place.student, factory=recipe.student.architecture)
    standing = [_standing(place.artifacts / job.name, made_from, job, force, recipe) for job in jobs]
    learnt: dict[Job, Learnt] = {}
    compared = calibration = torch.empty(0)
    if not all(standing):  # reading the data may take a while; where nothing is to be written nobody waits for it
        dataset = data.load(recipe.data)
        if dataset.sha256 != made_from["data_sha256"]:
            raise EdgekitError(
                "the data has changed since the student was trained", where=dataset.name, mend="Train again"
            )
        chosen = dataset.validation[data.stratified(dataset.validation.labels, COMPARED, 0)]
        compared, calibration = chosen.floats(), dataset.calibration.floats()
        missing = [job for job, there in zip(jobs, standing, strict=True) if job.trained and not there]
        if missing:
            try:
                learnt = _learn(missing, place, student, recipe, dataset, made_from, force)
            except KeyboardInterrupt:
                say(f"Interrupted. Continue with: {_command(place, jobs, formats, listed, label, force)}")
                raise
    reports = []
    with contextlib.ExitStack() as after, progress() as bar:
        after.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(place.info().get("threads", 1))
        task = bar.add_task("exporting", total=len(jobs), note="")
        for job, there in zip(jobs, standing, strict=True):
            bar.update(task, note=job.name)
            folder = place.artifacts / job.name
            if there:
                say(f"{job.name}: already there")
            else:
                _write(job, folder, student, made_from, compared, calibration, learnt.get(job))
            written = artifacts.load(folder)
            reports.append({"name": job.name, "written": not there, **written.record})
            if not there:
                _tell(written)
            bar.advance(task)
    result: dict[str, Any] = {"run": str(place.folder), "artifacts": reports}
    floats = {job.format: job for job in jobs if job.precision == "fp32" and not job.trained}
    pairs = [(job, floats[job.format]) for job in jobs if job.precision == "int8"]
    if len(compared) and pairs:
        result["latency"] = [_compare_latency(place, low, full, compared) for low, full in pairs]
    return result


def _jobs(formats: str | Sequence[str] | None, int8: bool, fp16: bool, label: str | None) -> list[Job]:
    if label is not None and (not label or not all(letter.isalnum() or letter in "._" for letter in label)):
        raise EdgekitError("a label is made of letters, digits, '.' and '_'", where=f"--label {label}")
    if formats is None:
        if fp16:
            raise EdgekitError("no format is written in fp16 by this version", where="--fp16", mend="Use --int8")
        jobs = [Job(format, "fp32", label) for format in DEFAULT_FORMATS]
        return [*jobs, Job("onnx", "int8", label)] if int8 else jobs
    listed = formats.split(",") if isinstance(formats, str) else formats
    names = list(dict.fromkeys(stripped for name in listed if (stripped := name.strip())))
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


def _trained(jobs: Sequence[Job], label: str | None, *, control: bool) -> list[Job]:
    """The same with every int8 file trained, and its control beside it."""
    if not any(job.precision == "int8" for job in jobs):
        raise EdgekitError("what it trains is an int8 file", where="--qat", mend="Add --int8")
    name = label or "qat"
    made = [dataclasses.replace(job, label=name, trained=True) if job.precision == "int8" else job for job in jobs]
    return [*made, Job("onnx", "fp32", f"{name}.control", trained=True)] if control else made


def _option(control: bool, overrides: Sequence[str]) -> str:
    return "--qat-control" if control else f"--set {overrides[0]}"


def _learn(
    jobs: Sequence[Job],
    place: Run,
    student: Network,
    recipe: Recipe,
    dataset: data.Dataset,
    made_from: dict[str, Any],
    force: bool,
) -> "dict[Job, Learnt]":
    """Train what each job is to hold, in runs/NAME/qat/LABEL, from where it was interrupted."""
    from edgekit import train
    from edgekit.quantize import qat

    train.alone()
    model = onnx.lower(student)
    with machine.enough_memory(where=place.folder, mend="Free some of it, and type the same command again"):
        return {
            job: qat.learn(
                model,
                student,
                recipe,
                dataset,
                dataset.calibration.floats(),
                quantize.SCHEMES["x86"],
                Run(place.folder / "qat" / (job.label or "qat")),
                student_sha256=made_from["student_sha256"],
                control=job.precision == "fp32",
                threads=place.info().get("threads", 1),
                restart=force,
            )
            for job in jobs
        }


def _command(
    place: Run,
    jobs: Sequence[Job],
    formats: str | Sequence[str] | None,
    overrides: Sequence[str],
    label: str | None,
    force: bool,
) -> str:
    """What continues an interrupted training."""
    typed = ["edgekit", "export", str(place.folder), "--int8", "--qat"]
    if any(job.trained and job.precision == "fp32" for job in jobs):
        typed.append("--qat-control")
    for override in overrides:
        typed += ["--set", override]
    if formats is not None:
        typed += ["--format", formats if isinstance(formats, str) else ",".join(formats)]
    if label is not None:
        typed += ["--label", label]
    return shlex.join([*typed, "--force"] if force else typed)


def _made_from(run: Run) -> dict[str, Any]:
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


def _standing(folder: Path, made_from: dict[str, Any], job: Job, force: bool, recipe: Recipe) -> bool:
    """Whether this very artifact is there already; another one under its name is refused."""
    if force or not folder.exists():
        return False
    if not (folder / "artifact.json").exists():
        raise EdgekitError(
            "what stands here is no artifact", where=folder, mend="Use --label to keep it, or --force to replace it"
        )
    there = artifacts.load(folder).record
    scheme = quantize.SCHEMES["x86"].record() if job.precision == "int8" else None
    made = {"made_from": made_from, "edgekit": edgekit.__version__, "scheme": scheme}
    trained = {key: value for key, value in there.get("qat", {}).items() if key != "validation"}
    if trained != _asked(job, recipe) or any(there.get(key) != value for key, value in made.items()):
        raise EdgekitError(
            "another artifact has this name", where=folder, mend="Use --label to keep both, or --force to replace it"
        )
    return True


def _asked(job: Job, recipe: Recipe) -> dict[str, Any]:
    if not job.trained:
        return {}
    from edgekit.quantize import qat

    return qat.asked(recipe, control=job.precision == "fp32")


def _write(
    job: Job,
    folder: Path,
    student: Network,
    made_from: dict[str, Any],
    compared: Tensor,
    calibration: Tensor,
    learnt: "Learnt | None" = None,
) -> None:
    channels, height, width = student.input_shape
    described = {
        "shape": [None, channels, height, width],
        "layout": "NCHW",
        "range": [0, 1],
        "normalization": "inside",
        "resize": [height, width],
        "crop": None,
    }
    metadata = {
        "edgekit": edgekit.__version__,
        "classes": json.dumps(student.classes),
        "input": json.dumps(described),
        "outputs": "logits",
        "student_sha256": made_from["student_sha256"],
    }
    record: dict[str, Any] = {
        "schema": artifacts.SCHEMA,
        "edgekit": edgekit.__version__,
        "format": job.format,
        "precision": job.precision,
    }
    with writing_folder(folder) as part:
        if job.precision == "int8":
            scheme = quantize.SCHEMES["x86"]
            made = learnt.made if learnt else quantize.quantize(onnx.lower(student), calibration, scheme)
            model = learnt.model if learnt else made.model
            pairs = quantize.unsafe_pairs(model)
            if not pairs:  # a proof about no layer at all proves nothing
                raise EdgekitError("no layer of this student could be quantized", where=job.name)
            if unsafe := {name: count for name, count in pairs.items() if count}:
                raise EdgekitError(
                    f"{sum(unsafe.values())} weight pairs could saturate, the first in {next(iter(unsafe))}",
                    where=job.name,
                )
            onnx.write_model(model, part, metadata)
            record |= {"scheme": scheme.record(), "calibration": made.calibration, "in_float": made.in_float}
        elif learnt:
            onnx.write_model(learnt.model, part, metadata)
        else:
            FORMATS[job.format].write(student, part, metadata)
        if learnt:
            record["qat"] = learnt.record
        paths = sorted(part.iterdir())
        record |= {
            "files": [{"path": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)} for path in paths],
            "input": described,
            "outputs": "logits",
            "classes": list(student.classes),
            "made_from": made_from,
            "versions": _versions(job.format),
        }
        expected = predict(student, compared)
        for path in paths:  # every file that ships, the lite interpreter's too
            answered = predict(FORMATS[job.format].open(path), compared)
            against = _against(expected, answered, job, path.name)
            if path.name == artifacts.JUDGED[job.format]:
                record["against_float"] = against
        if job.precision == "int8":
            exact = predict(onnx.open(part / onnx.FILE, precise=True), compared)
            default = predict(onnx.open(part / onnx.FILE), compared)
            if not torch.equal(exact, default):
                raise EdgekitError(
                    "the int8 file answers differently under saturating and exact arithmetic", where=job.name
                )
        write_json(part / "artifact.json", record)


def _against(expected: Tensor, answered: Tensor, job: Job, file: str) -> dict[str, Any]:
    if answered.shape != expected.shape or not answered.isfinite().all():
        raise EdgekitError(
            f"{file} answers {tuple(answered.shape)} or infinite logits, the student {tuple(expected.shape)}",
            where=job.name,
        )
    agreement = (answered.argmax(1) == expected.argmax(1)).double().mean().item()
    difference = (answered - expected).abs().max().item()
    if job.precision == "fp32" and not job.trained and agreement < AGREES:
        raise EdgekitError(
            f"{file} agrees with the student on {100 * agreement:.1f} % of {len(expected)} images only", where=job.name
        )
    return {"images": len(expected), "agreement": agreement, "max_abs_difference": difference}


def _versions(format: str) -> dict[str, str]:
    names = {"onnx": ("torch", "onnx", "onnxscript", "onnxruntime"), "torchscript": ("torch",)}[format]
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}


def _tell(written: Artifact) -> None:
    against = written.record["against_float"]
    say(
        f"{written.name}: {written.bytes / 1e6:.2f} MB; agrees with the student on {100 * against['agreement']:.1f} % "
        f"of {against['images']} validation images, logits differ by at most {against['max_abs_difference']:.2g}"
    )
    if trained := written.record.get("qat"):
        best = trained["validation"]
        say(
            f"{written.name}: trained further, best after epoch {best['epoch']} of {trained['epochs']}: validation "
            f"accuracy {100 * best['clean_accuracy']:.1f} % clean, {100 * best['robust_accuracy']:.1f} % under PGD"
        )
    if "scheme" in written.record and written.record["scheme"]["cannot_saturate"]:
        # Where this processor never sums in 16 bits, the default and the precise session are one arithmetic.
        measured = "; both arithmetics gave the same answers here" if machine.saturates() else ""
        say(f"{written.name}: no pair of weights can saturate 16 bits{measured}")


def interleaved(works: Sequence[Callable[[], object]], repetitions: int = 15) -> list[float]:
    """Median seconds of each piece of work, run in turn so that a drifting machine slows all alike."""
    seconds: list[list[float]] = [[] for _ in works]
    for round in range(repetitions + 2):
        for times, work in zip(seconds, works, strict=True):
            begin = time.perf_counter()
            work()
            if round >= 2:  # the first rounds warm caches and memory pools up
                times.append(time.perf_counter() - begin)
    return [statistics.median(times) for times in seconds]


def _compare_latency(run: Run, low: Job, full: Job, images: Tensor) -> dict[str, Any]:
    """Time of the int8 file against the fp32 file of the same format, one thread; said also where int8 loses."""

    def asker(judged: Classifier, batch: Tensor) -> Callable[[], object]:
        return lambda: judged(batch)

    # In this process: a latency holds no pipes.
    opened = [judge.open(artifacts.load(run.artifacts / job.name), threads=1, isolated=False) for job in (low, full)]
    result: dict[str, Any] = {"artifact": low.name, "against": full.name, "threads": 1, "batches": []}
    for batch in (1, 32):
        pixels = images[:1].expand(batch, -1, -1, -1).contiguous() if len(images) < batch else images[:batch]
        first, second = interleaved([asker(judged, pixels) for judged in opened])
        ratio = second / first
        word = f"{ratio:.2f}x faster" if ratio >= 1 else f"{1 / ratio:.2f}x SLOWER"
        times = f"{1000 * first:.2f} ms, {full.name} {1000 * second:.2f} ms"
        say(f"{low.name}, batch {batch}: {times}: int8 is {word} (medians, one thread)")
        result["batches"].append({"batch": batch, "seconds": first, "fp32_seconds": second, "ratio": ratio})
    return result
