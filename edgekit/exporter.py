"""Student + formats -> artifacts, each opened again in its own runtime and compared before it is called written."""

import contextlib
import functools
import importlib
import importlib.metadata
import json
import platform
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import Progress, TaskID
from torch import Tensor

import edgekit
from edgekit import artifact as artifacts
from edgekit import imported, judge, machine, models, quantize, runs, target
from edgekit.artifact import Artifact
from edgekit.classifier import Classifier, predict
from edgekit.console import progress, say
from edgekit.data import load as load_data
from edgekit.errors import EdgekitError, choose
from edgekit.files import sha256, write_json, writing_folder
from edgekit.formats import FORMATS, lacking, onnx
from edgekit.jobs import Job, Order, aimed, listed, made_from, trained, typed
from edgekit.machine import interleaved
from edgekit.quantize.ladder import Kept, Material
from edgekit.quantize.start import PTQ
from edgekit.recipe import read, split_override
from edgekit.report import layers
from edgekit.runs import Run
from edgekit.stock import Made, Stock
from edgekit.target import Target
from edgekit.verdict import to_dict

if TYPE_CHECKING:
    from onnx import ModelProto


AS_GRAPH = 0.9  # an int8 file with its own graph, less than any runtime's rounding was seen to cost
AGREES = 0.99  # a float file that decides otherwise on more than 1 % of the images is not the student


def export(
    run: str | Path | None = None,
    *,
    int8: bool = False,
    fp16: bool = False,
    formats: str | Sequence[str] | None = None,
    targets: str | Sequence[str] | None = None,
    ptq: str = "tuned",
    sensitivity: bool = False,
    robust_drop: float | None = None,
    qat: bool = False,
    qat_control: bool = False,
    overrides: str | Sequence[str] = (),
    label: str | None = None,
    force: bool = False,
    weights: str | Path | None = None,
    model: str | None = None,
    data: str | Path | None = None,
    size: int | None = None,
    mean: str | None = None,
    std: str | None = None,
    classes: str | Path | None = None,
) -> dict[str, Any]:
    """Write the deployable files of a run's student into its artifacts/ folder.

    Args:
        run: a run folder; the latest by default.
        int8: with `formats`, this precision is added to fp32 in every format named; without, onnx-int8 is added.
        fp16: the same with this precision.
        formats: names of FORMATS, also as one string with commas; "all" is every one of them.
        targets: names of profiles (target.py), each of which says format and precision; in place of `formats`.
        ptq: "tuned": int8 files get the settings that cost least on validation images; "plain": min-max ranges.
        sensitivity: measure what quantizing each layer alone costs, on validation images: sensitivity.json and
            sensitivity.png in the int8 artifact's folder.
        robust_drop: the loss of robust accuracy on validation images, a fraction, that the int8 file may have: of the
            tries of quantize/ladder.py the first that keeps to it is written, else the best of them.
        qat: train the int8 file further (quantize/qat.py), under the label "qat" where no other is given; what was
            interrupted continues. With `robust_drop` it is the last of the tries.
        qat_control: train the float student in the same way too, for comparison: onnx-fp32-<label>.control.
        overrides: of the recipe's table [qat], such as "qat.epochs=4"; with `weights` of any of its tables.
        label: the last part of the artifacts' names.
        force: replace what stands under the same name.
        weights: a network trained elsewhere, of which a run is made first (imported.py), in place of `run`.
        model, data, size, mean, std, classes: what it is and what it eats, as imported.Given explains them.
    Returns:
        {"run", "artifacts": [{"name", "written", artifact.json's content…}], "within_budget", "latency": […]}: what
            `--json` prints; `within_budget` is False where an artifact misses the budget of its target;
            `latency` (int8 against fp32) only where a file was written; `sensitivity` in the int8 artifact where it was
            asked for; the `held` of its `robust_drop` says whether that budget was kept, its `target` what came of the
            budget of its target.
    Raises:
        EdgekitError: no finished run, a format or precision that is not there, another artifact under the same name,
            or a file that does not answer as the student does.
        KeyboardInterrupt: training was interrupted; after one line that says how to continue.
    """
    jobs = _jobs(formats, targets, int8, fp16, label, robust_drop)
    changes = (overrides,) if isinstance(overrides, str) else tuple(overrides)
    given = _given(run, weights, changes, model=model, data=data, size=size, mean=mean, std=std, classes=classes)
    if given is not None:
        changes = tuple(change for change in changes if change not in given.overrides)
    _asked(any(job.precision == "int8" for job in jobs), sensitivity, robust_drop)
    if robust_drop is not None and any(job.precision == "int8" and job.format != "onnx" for job in jobs):
        mend = "Say --format onnx" if targets is None else "Name targets whose format is onnx"
        raise EdgekitError("its tries are measured as ONNX files", where="--robust-drop", mend=mend)
    choose(dict.fromkeys(PTQ, ptq), ptq, "quantization", where="--ptq")
    if qat:
        # Where training is one try of several, the file is named as any other.
        jobs = trained(jobs, label or ("qat" if robust_drop is None else None), control=qat_control)
    elif qat_control or changes:
        raise EdgekitError("says how --qat trains", where=_option(qat_control, changes), mend="Add --qat")
    place = runs.find(run) if given is None else imported.bring(given)
    torch.set_flush_denormal(True)
    source = made_from(place)
    recipe = read(place.recipe_file, changes)
    if wrong := [override for override in changes if split_override(override)[0][0] != "qat"]:
        raise EdgekitError(
            "the student is trained already; only keys of the table [qat] can be set", where=f"--set {wrong[0]}"
        )
    student = models.load(place.student, factory=recipe.student.architecture)
    again = typed(place, fp16, ptq, sensitivity, robust_drop, qat, qat_control, changes, formats, label, force, targets)
    order = Order(place, source, recipe, student, ptq, robust_drop, qat, again, force)
    standing = [_standing(place.artifacts / job.name, order, job) for job in jobs]
    unmeasured = sensitivity and any(
        job.precision == "int8" and not (place.artifacts / job.name / layers.FILE).is_file() for job in jobs
    )
    compared = torch.empty(0)
    stock: Stock | None = None
    # Reading the data may take a while; where nothing is to be written nobody waits for it.
    if not all(standing) or unmeasured:
        dataset = load_data(recipe.data)
        if dataset.sha256 != source["data_sha256"]:
            raise EdgekitError(
                "the data has changed since the student was trained", where=dataset.name, mend="Train again"
            )
        stock = Stock(order, dataset)
        compared = stock.chosen.floats()
    reports = []
    floats = {job.format: job for job in jobs if job.precision == "fp32" and not job.trained}
    with contextlib.ExitStack() as after, progress() as bar:
        after.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(place.info().get("threads", 1))
        task = bar.add_task("exporting", total=len(jobs), note="")
        for job, there in zip(jobs, standing, strict=True):
            bar.update(task, note=job.name)
            folder = place.artifacts / job.name
            with Kept(place.folder / f".{job.name}.search.json") as kept:
                material = made = None
                if stock is not None and job.precision == "int8" and (sensitivity or robust_drop is not None):
                    material = stock.material(job, kept, partial(_note, bar, task, job.name))
                if there:
                    say(f"{job.name}: already there")
                elif stock is not None:
                    full = place.artifacts / floats[job.format].name if job.format in floats else None
                    made = stock.make(job, material, full)
                    _write(job, folder, order, compared, made)
                more = _layers(folder, material, asked=sensitivity and job.precision == "int8")
            written = artifacts.load(folder)
            reports.append({"name": job.name, "written": not there, **written.record, **more})
            if not there:
                _tell(written)
            if job.target is not None:
                _cost(written)
            bar.advance(task)
    within = all(target.held(report["target"]) for report in reports if "target" in report)
    result: dict[str, Any] = {"run": str(place.folder), "artifacts": reports, "within_budget": within}
    pairs = [
        (job, floats[job.format])
        for job in jobs
        if job.precision == "int8" and job.format in floats and not lacking(job.format)
    ]
    if len(compared) and pairs:
        result["latency"] = [_compare_latency(place, low, full, compared) for low, full in pairs]
    return result


def _given(
    run: str | Path | None, weights: str | Path | None, changes: Sequence[str], **said: Any
) -> imported.Given | None:
    """What is said of a network trained elsewhere; None where none is named."""
    named = [name for name, value in said.items() if value is not None]
    if weights is None:
        if named:
            raise EdgekitError("is about a network trained elsewhere", where=f"--{named[0]}", mend="Add --weights FILE")
        return None
    if run is not None:
        raise EdgekitError("the run already has a student", where=f"--weights {weights}", mend=f"Leave out {run}")
    about = tuple(change for change in changes if split_override(change)[0][0] != "qat")
    said |= {"data": str(said["data"])} if said["data"] is not None else {}
    said |= {"classes": Path(said["classes"])} if said["classes"] is not None else {}
    return imported.Given(Path(weights), overrides=about, **said)


def _jobs(
    formats: str | Sequence[str] | None,
    targets: str | Sequence[str] | None,
    int8: bool,
    fp16: bool,
    label: str | None,
    robust_drop: float | None,
) -> list[Job]:
    if targets is None:
        return listed(formats, int8, fp16, label)
    if formats is not None:
        raise EdgekitError("a target says its format itself", where="--format", mend="Leave out --format or --target")
    return aimed(targets, int8, fp16, label, full=robust_drop is not None)


def _asked(int8: bool, sensitivity: bool, robust_drop: float | None) -> None:
    for option, asked in (("--sensitivity", sensitivity), ("--robust-drop", robust_drop is not None)):
        if asked and not int8:
            raise EdgekitError("is about an int8 file", where=option, mend="Add --int8")
    if robust_drop is not None and not 0 <= robust_drop <= 1:
        raise EdgekitError(f"should be between 0 and 100 points, not {100 * robust_drop:g}", where="--robust-drop")


def _option(control: bool, overrides: Sequence[str]) -> str:
    return "--qat-control" if control else f"--set {overrides[0]}"


def _standing(folder: Path, order: Order, job: Job) -> bool:
    """Whether this very artifact is there already; another one under its name is refused."""
    if order.force or not folder.exists():
        return False
    if not (folder / "artifact.json").exists():
        raise EdgekitError(
            "what stands here is no artifact", where=folder, mend="Use --label to keep it, or --force to replace it"
        )
    there = artifacts.load(folder).record
    scheme = quantize.SCHEMES[FORMATS[job.format].SCHEME].record() if job.precision == "int8" else None
    same = [there.get("made_from") == order.made_from, there.get("edgekit") == edgekit.__version__]
    same.append(there.get("scheme") == scheme)
    same.append(there.get("target", {}).get("profile") == (job.target.record() if job.target else None))
    searched = there.get("robust_drop", {})
    if job.precision == "int8":
        same.append(there["calibration"].get("ptq", "plain") == order.ptq)
        same.append(searched.get("allowed") == order.robust_drop)
    if order.robust_drop is not None and job.precision == "int8":  # it may have come to its end before it trained
        same.append(searched.get("training") == order.last(job).get("training"))
    else:
        trained = {key: value for key, value in there.get("qat", {}).items() if key != "validation"}
        same.append(trained == order.training(job))
    if not all(same):
        raise EdgekitError(
            "another artifact has this name", where=folder, mend="Use --label to keep both, or --force to replace it"
        )
    return True


def _write(job: Job, folder: Path, order: Order, compared: Tensor, made: Made | None) -> None:
    student, metadata, format = order.student, order.metadata(job.format), FORMATS[job.format]
    record: dict[str, Any] = {
        "schema": artifacts.SCHEMA,
        "edgekit": edgekit.__version__,
        "format": job.format,
        "precision": job.precision,
    }
    with writing_folder(folder) as part:
        if made is not None:
            if job.precision == "int8" and quantize.SCHEMES[format.SCHEME].cannot_saturate:
                _safe(made.model, job)
            format.write_model(made.model, part, metadata, job.precision)
            record |= made.record
        else:
            format.write(student, part, metadata, job.precision)
        missing = lacking(job.format)
        if job.precision == "int8" and missing is None:
            record["operators"] = format.running(part / format.FILE)
        paths = {path.relative_to(part).as_posix(): path for path in sorted(part.rglob("*")) if path.is_file()}
        record |= {
            "files": [
                {"path": name, "bytes": path.stat().st_size, "sha256": sha256(path)} for name, path in paths.items()
            ],
            "input": order.input(job.format),
            "outputs": "logits",
            "classes": list(student.classes),
            "made_from": order.made_from,
            "versions": _versions(job.format),
        }
        if missing is not None:
            record["not_compared"] = f"{format.RUNTIME} needs {missing}, which the machine that exported it lacks"
        expected = predict(student, compared)
        for name in format.OPENED if missing is None else ():  # every file that ships, the lite interpreter's too
            answered = predict(format.open(part / name), compared)
            against = _against(expected, answered, job, name)
            if (part / artifacts.TWIN).is_file():
                _as_its_graph(answered, predict(onnx.open(part / artifacts.TWIN), compared), job)
            if name == format.FILE:
                record["against_float"] = against
        if (job.format, job.precision) == ("onnx", "int8"):
            exact = predict(onnx.open(part / onnx.FILE, precise=True), compared)
            default = predict(onnx.open(part / onnx.FILE), compared)
            if not torch.equal(exact, default):
                raise EdgekitError(
                    "the int8 file answers differently under saturating and exact arithmetic", where=job.name
                )
        if job.target is not None:
            record["target"] = _budget(job.target, Artifact(part, record), compared)
        write_json(part / "artifact.json", record)


def _budget(place: Target, made: Artifact, images: Tensor) -> dict[str, Any]:
    """What the file costs, against what the target allows."""
    before = torch.get_num_threads()
    torch.set_num_threads(place.threads)  # which is how TorchScript is told
    try:
        pixels = images[:1].expand(place.batch, -1, -1, -1).contiguous()

        @functools.cache
        def opened() -> Classifier:  # not before it is needed: some formats open on their device alone
            return judge.open(made, threads=place.threads, isolated=False)

        return target.measure(place, made.bytes, lambda: opened()(pixels))
    finally:
        torch.set_num_threads(before)


def _safe(model: "ModelProto", job: Job) -> None:
    """See that no pair of weights can saturate."""
    pairs = quantize.unsafe_pairs(model)
    if not pairs:  # a proof about no layer at all proves nothing
        raise EdgekitError("no layer of this student could be quantized", where=job.name)
    if unsafe := {name: count for name, count in pairs.items() if count}:
        raise EdgekitError(
            f"{sum(unsafe.values())} weight pairs could saturate, the first in {next(iter(unsafe))}", where=job.name
        )


def _note(bar: Progress, task: TaskID, job: str, text: str) -> None:
    bar.update(task, note=f"{job}: {text}")


def _layers(folder: Path, material: Material | None, *, asked: bool) -> dict[str, Any]:
    """sensitivity.json and sensitivity.png beside an int8 file, where asked for or where a search has measured it."""
    path = folder / layers.FILE
    if material is not None and (asked or material.measured) and not path.is_file():
        document = to_dict(material.sensitivity)
        layers.draw(document, path.with_suffix(".png"))
        write_json(path, document)
        say(f"{folder.name}: what each layer costs stands in {path.name} and {path.stem}.png beside the file")
    if not asked:
        return {}
    try:
        return {"sensitivity": json.loads(path.read_text(encoding="utf-8"))}
    except ValueError:
        raise EdgekitError("not valid JSON", where=path, mend="Remove it") from None


def _against(expected: Tensor, answered: Tensor, job: Job, file: str) -> dict[str, Any]:
    if answered.shape != expected.shape or not answered.isfinite().all():
        raise EdgekitError(
            f"{file} answers {tuple(answered.shape)} or infinite logits, the student {tuple(expected.shape)}",
            where=job.name,
        )
    agreement = (answered.argmax(1) == expected.argmax(1)).double().mean().item()
    difference = (answered - expected).abs().max().item()
    if job.precision != "int8" and not job.trained and agreement < AGREES:
        raise EdgekitError(
            f"{file} agrees with the student on {100 * agreement:.1f} % of {len(expected)} images only", where=job.name
        )
    return {"images": len(expected), "agreement": agreement, "max_abs_difference": difference}


def _as_its_graph(answered: Tensor, graph: Tensor, job: Job) -> None:
    """Refuse an int8 file that is not the graph it was made of: runtimes round otherwise, none of them so much."""
    agreement = (answered.argmax(1) == graph.argmax(1)).double().mean().item()
    if agreement < AS_GRAPH:
        raise EdgekitError(
            f"decides as the graph that it was made of on {100 * agreement:.1f} % of {len(graph)} images only",
            where=job.name,
        )


def _versions(format: str) -> dict[str, str]:
    return {"python": platform.python_version(), **{name: _version(name) for name in FORMATS[format].PACKAGES}}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # it is installed by another name, as tensorrt_rtx_cu13 is
        return str(importlib.import_module(package).__version__)


def _cost(written: Artifact) -> None:
    """What came of the budget of its target: said of every export, also where the file was there already."""
    for sentence in target.sentences(written.record["target"]):
        say(f"{written.name}: {sentence}")


def _tell(written: Artifact) -> None:
    against, size = written.record.get("against_float"), f"{written.bytes / 1e6:.2f} MB"
    if against is None:
        say(f"{written.name}: {size}; NOT compared with the student: {written.record['not_compared']}")
    else:
        say(
            f"{written.name}: {size}; agrees with the student on {100 * against['agreement']:.1f} % of "
            f"{against['images']} validation images, logits differ by at most {against['max_abs_difference']:.2g}"
        )
    for layer in written.record.get("float_layers", []):
        if layer["reason"] not in (quantize.BEFORE, quantize.FLOATS):
            say(f"{written.name}: {layer['layer']} ({layer['operator']}) stays float: {layer['reason']}")
    if operators := written.record.get("operators"):
        floats = ", ".join(f"{count} {kind}" for kind, count in operators["float"].items()) or "none"
        runtime = FORMATS[written.format].RUNTIME
        say(f"{written.name}: {runtime} runs {operators['int8']} operators on integers; in float: {floats}")
    if trained := written.record.get("qat"):
        best = trained["validation"]
        say(
            f"{written.name}: trained further, best after epoch {best['epoch']} of {trained['epochs']}: validation "
            f"accuracy {100 * best['clean_accuracy']:.1f} % clean, {100 * best['robust_accuracy']:.1f} % under PGD"
        )
    # Proved for the order in which ONNX Runtime's kernels pair weights; of others nothing is known.
    if written.format == "onnx" and "scheme" in written.record and written.record["scheme"]["cannot_saturate"]:
        # Where this processor never sums in 16 bits, the default and the precise session are one arithmetic.
        measured = "; both arithmetics gave the same answers here" if machine.saturates() else ""
        say(f"{written.name}: no pair of weights can saturate 16 bits{measured}")


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
