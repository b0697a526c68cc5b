"""The one training loop: any method, any model, resumable to the same weights."""

import contextlib
import functools
import io
import json
import math
import os
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch import nn

import edgekit
from edgekit import data, machine, models, runs
from edgekit.attacks.pgd import pgd
from edgekit.console import progress, say
from edgekit.data import Dataset, Split
from edgekit.errors import EdgekitError, choose, printable
from edgekit.files import cache_folder, digest, sha256, write_text, writing
from edgekit.methods import METHODS
from edgekit.methods.inner import Inner
from edgekit.models import Network
from edgekit.models.fold import fold
from edgekit.randomness import derive
from edgekit.recipe import Recipe, Train, read, to_toml
from edgekit.report import curves
from edgekit.runs import Run

# Purposes of a seed: what is drawn for one must never repeat what is drawn for another.
_INIT, _ORDER, _AUGMENT, _INNER, _VALIDATE = range(5)


@dataclass(frozen=True)
class Prepared:
    """A network that is trained further, in the place of a new one of the recipe's.

    Attributes:
        before_step: called before each step with the number of steps done and of all steps.
        code: a digest of the sources that decide what the network is trained to.
        mend: what is said to people where the loss is no number.
    """

    network: Network
    before_step: Callable[[int, int], None]
    code: str
    mend: str


def distill(
    recipe: str | Path,
    *,
    overrides: str | Sequence[str] = (),
    run: str | Path | None = None,
    resume: bool = False,
    device: str | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """Train the student that `recipe` describes, and first its teacher where that is not trained yet.

    Args:
        recipe: a recipe file; looked for here, then among the shipped ones.
        overrides: such as "train.epochs=5", one or several.
        run: the run folder; by default the first free runs/<recipe>-<n>.
        resume: continue a run (by default the newest of this recipe), with its recorded recipe, seed and threads; from
            the beginning where there is none.
        device: cpu, cuda, cuda:1, mps, xpu; by default a GPU where there is one, and a resumed run's own.
    Returns:
        run.json's content, and "run": the folder.
    Raises:
        EdgekitError: bad input, said in one sentence; (exit code 4) a device, a precision or an amount of memory that
            this machine does not have.
        KeyboardInterrupt: after one line that says how to continue.
    """
    alone()
    listed = (overrides,) if isinstance(overrides, str) else tuple(overrides)
    try:
        with machine.enough_memory(where=recipe, mend="Lower train.batch_size, or choose a smaller student"):
            return _distill(recipe, listed, Path(run) if run is not None else None, resume, device, seed)
    except KeyboardInterrupt as stop:
        say(f"Interrupted. {stop or 'Nothing was begun yet'}")
        raise


def alone() -> None:
    """Refuse to train where a launcher started several processes.

    Raises:
        EdgekitError: it did.
    """
    if (count := machine.processes()) > 1 or (count := machine.asked_of_accelerate()) != 1:
        raise EdgekitError(
            f"this version trains in one process, and {count or 'several'} were asked for",
            mend="Start edgekit without a launcher",
        )


def _distill(
    recipe: str | Path,
    overrides: Sequence[str],
    folder: Path | None,
    resume: bool,
    device: str | None,
    seed: int | None,
) -> dict[str, Any]:
    stem = Path(recipe).stem
    found = runs.to_resume(stem, folder) if resume else None
    begun = found is not None and found.begun
    plan = runs.recorded(found, recipe, overrides, seed) if found and begun else read(recipe, overrides, seed)
    if found and found.finished:
        say(f"{found.folder} has finished already")
        return {"run": str(found.folder), **found.info()}
    if found and begun:
        _same_code(found)
        device = device or found.info().get("device")
    # Everything that can be wrong is looked at before a folder is made or a teacher trained.
    where = machine.device(device)
    _check(plan, where, recipe)
    dataset = data.load(plan.data)
    _check_student(plan, dataset, recipe)
    teacher, taught = None, None
    if plan.teacher is not None and METHODS[plan.method.name].needs_teacher:
        if plan.teacher.weights is not None:
            teacher = _open_teacher(Path(plan.teacher.weights), plan.teacher.factory, dataset)
        else:
            taught = _teacher_recipe(plan, dataset, where)
    current = found or runs.create(stem, folder)
    if not begun:
        if resume:
            say(f"{current.folder}: there is nothing to continue yet; it starts from the beginning")
        current.begin(recipe, plan, latest=folder is None)
    with _recording(current):
        if taught is not None:
            teacher = _open_teacher(_train_teacher(taught, plan, dataset, where), taught.student.architecture, dataset)
        info = fit(plan, dataset, teacher, current, where)
    if info.get("latest"):
        runs.set_latest(current)
    return {"run": str(current.folder), **info}


@contextlib.contextmanager
def _recording(run: Run) -> Iterator[None]:
    """Let run.json say how the work on `run` ended, also where it was interrupted or failed."""
    status = "failed"
    try:
        yield
    except KeyboardInterrupt:
        status = "interrupted"
        raise KeyboardInterrupt(f"Continue with: {runs.continue_command(run)}") from None
    finally:
        # What ended the work is what must be said, not that the disk is too full to note it.
        with contextlib.suppress(OSError, EdgekitError):
            if run.info().get("status") == "running":
                run.save_info(run.info() | {"status": status})


def _same_code(run: Run) -> None:
    if not run.checkpoint.is_file():
        return
    versions = run.info().get("versions", {})
    if versions.get("code") != code_version():
        raise EdgekitError(
            f"the run was begun with other training code (edgekit {versions.get('edgekit')})",
            where=run.folder,
            mend="Continue it with that code, or start a new run without --resume",
        )
    if versions.get("torch") != torch.__version__:
        say(f"Begun with torch {versions.get('torch')}, this is {torch.__version__}: the last bits may differ")


def _check(plan: Recipe, device: torch.device, where: object) -> None:
    choose(METHODS, plan.method.name, "method", where=where)
    if METHODS[plan.method.name].needs_teacher and plan.teacher is None:
        raise EdgekitError(
            f"the method '{plan.method.name}' needs a teacher", where=where, mend="Add a table [teacher]"
        )
    machine.check_precision(plan.train.precision, device, where=where)


def _check_student(plan: Recipe, dataset: Dataset, where: object) -> None:
    """Build the student once: the only way to know of every architecture whether its keys and the images fit."""
    ones = [1.0] * dataset.input_shape[0]
    try:
        models.build(plan.student, dataset.classes, dataset.input_shape, ones, ones)
    except EdgekitError as error:
        raise EdgekitError(
            error.what, where=error.where or where, mend=error.mend, exit_code=error.exit_code
        ) from error


def _teacher_recipe(recipe: Recipe, dataset: Dataset, device: torch.device) -> Recipe:
    """The recipe of the teacher, fit for being trained here."""
    named = recipe.teacher.recipe if recipe.teacher else None
    # The student's data decides: with another split the teacher would have seen its validation images.
    plan = read(named or "").model_copy(update={"data": recipe.data})
    if plan.teacher is not None:
        raise EdgekitError("the recipe of a teacher cannot itself have a teacher", where=named)
    _check(plan, device, named)
    _check_student(plan, dataset, named)
    return plan


def teacher_of(recipe: Recipe, dataset: Dataset, device: torch.device) -> tuple[Network, dict[str, str]]:
    """The frozen teacher of a recipe that names one, trained now where that was not done yet, and what run.json says.

    Raises:
        EdgekitError: it cannot be opened or trained, or is of other data.
    """
    if recipe.teacher is not None and recipe.teacher.weights is not None:
        return _open_teacher(Path(recipe.teacher.weights), recipe.teacher.factory, dataset)
    plan = _teacher_recipe(recipe, dataset, device)
    return _open_teacher(_train_teacher(plan, recipe, dataset, device), plan.student.architecture, dataset)


def _train_teacher(plan: Recipe, recipe: Recipe, dataset: Dataset, device: torch.device) -> Path:
    """The weights of the teacher that `plan` describes, from the cache folder or trained now."""
    kept = Run(cache_folder() / "teachers" / digest(to_toml(plan), dataset.sha256, code_version())[:16])
    if not kept.finished:
        named = recipe.teacher.recipe if recipe.teacher else None
        say(f"The teacher ({named}) is trained first; it is kept for later runs")
        if not kept.begun:
            write_text(kept.recipe_file, to_toml(plan))
        with _recording(kept):
            fit(plan, dataset, None, kept, device, name=f"teacher {Path(named or kept.name).stem}")
    return kept.student


def _open_teacher(path: Path, factory: str | None, dataset: Dataset) -> tuple[Network, dict[str, str]]:
    """The frozen teacher in `path` and what run.json says of it."""
    teacher = models.load(path, factory=factory)
    if teacher.classes != dataset.classes:
        problem = f"the teacher knows {len(teacher.classes)} classes, the data has {len(dataset.classes)}"
        if len(teacher.classes) == len(dataset.classes):
            problem = "the teacher's classes have other names than the data's"
        raise EdgekitError(problem, where=path, mend="Name another teacher")
    if teacher.input_shape != dataset.input_shape:
        raise EdgekitError(
            f"the teacher takes {teacher.input_shape} images, the data has {dataset.input_shape}", where=path
        )
    return teacher.requires_grad_(False), {"file": path.name, "sha256": sha256(path)}


@functools.cache
def code_version() -> str:
    """A digest of the sources that decide what a recipe trains to."""
    root = Path(__file__).parent
    names = ["train.py", "classifier.py", "data.py", "randomness.py", "recipe.py"]
    found = [root / name for name in names]
    for folder in ("attacks", "methods", "models"):
        found += sorted(root.glob(f"{folder}/*.py"))
    return digest(*(part for path in found for part in (str(path.relative_to(root)), path.read_bytes())))


def learning_rate(train: Train, progress: float) -> float:
    """The rate at `progress` in [0, 1] of the run: linear warm-up, then steps at the milestones or half a cosine."""
    if progress < train.warmup:
        return train.learning_rate * (progress / train.warmup)
    if train.schedule == "cosine":
        return train.learning_rate * 0.5 * (1 + math.cos(math.pi * (progress - train.warmup) / (1 - train.warmup)))
    return train.learning_rate * train.gamma ** sum(progress >= milestone for milestone in train.milestones)


@contextlib.contextmanager
def _accelerated(device: torch.device, precision: str) -> Iterator[Accelerator]:
    """An Accelerator of this run's own device and precision.

    Accelerate keeps both for a whole process. Here a teacher and its student may differ in them, and so may edgekit and
    the program that called it: what stood before is put aside, and stands again afterwards.
    """
    states = (AcceleratorState._shared_state, PartialState._shared_state)
    before = [dict(state) for state in states]
    named = os.environ.get("ACCELERATE_TORCH_DEVICE")
    for state in states:
        state.clear()
    os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)  # its only way to name one GPU among several
    try:
        yield Accelerator(cpu=device.type == "cpu", mixed_precision={"fp32": "no"}.get(precision, precision))
    finally:
        for state, kept in zip(states, before, strict=True):
            state.clear()
            state.update(kept)
        os.environ.pop("ACCELERATE_TORCH_DEVICE")
        if named is not None:
            os.environ["ACCELERATE_TORCH_DEVICE"] = named


def fit(
    recipe: Recipe,
    dataset: Dataset,
    teacher: tuple[Network, dict[str, str]] | None,
    run: Run,
    device: torch.device,
    *,
    name: str | None = None,
    prepared: Prepared | None = None,
) -> dict[str, Any]:
    """Train into `run`, from its checkpoint where it has one, and return run.json's content.

    Args:
        teacher: the network, and what run.json is to say of it.
        name: what the progress calls it; the folder's name by default, which of a kept teacher is a digest.
        prepared: what is trained; by default a new student.
    Raises:
        EdgekitError: the checkpoint is damaged, or data or teacher are not those that it was made with.
    """
    # Denormals make a convolution many times slower, and threads started later inherit the setting.
    torch.set_flush_denormal(True)
    with _accelerated(device, recipe.train.precision) as accelerator:
        return _fit(recipe, dataset, teacher, run, accelerator, name or run.name, prepared)


def _fit(
    recipe: Recipe,
    dataset: Dataset,
    taught: tuple[Network, dict[str, str]] | None,
    run: Run,
    accelerator: Accelerator,
    name: str,
    prepared: Prepared | None,
) -> dict[str, Any]:
    train = recipe.train
    teacher, about_teacher = taught or (None, None)
    if prepared is None:
        student = models.build(
            recipe.student, dataset.classes, dataset.input_shape, *dataset.statistics(), _number(recipe.seed, _INIT)
        )
    else:
        student = prepared.network
    layout = torch.channels_last if train.channels_last else torch.contiguous_format
    student = student.to(accelerator.device).to(memory_format=layout)
    if teacher is not None:
        teacher = fold(teacher.to(accelerator.device).to(memory_format=layout).eval())
    optimizer = torch.optim.SGD(
        student.parameters(), train.learning_rate, train.momentum, weight_decay=train.weight_decay
    )
    info, state = run.info(), _load_checkpoint(run)
    if state:
        if state["data"] != dataset.sha256:
            raise EdgekitError(
                "the data has changed since the run was begun", where=recipe.data.name, mend="Start a new run"
            )
        if info.get("teacher") != about_teacher:
            raise EdgekitError(
                "the run was begun with another teacher", where=run.folder, mend="Bring that back, or start a new run"
            )
    info["threads"] = info.get("threads") or _threads(recipe, student, dataset, accelerator.device)
    torch.set_num_threads(info["threads"])
    log: list[dict[str, Any]] = []
    best: dict[str, Any] = {}
    model, optimizer = accelerator.prepare(student, optimizer)
    if state:
        log, best = _restore(run, state, student, optimizer, accelerator.scaler)
    info |= {
        "schema": 1,
        "status": "running",
        "seed": recipe.seed,
        "device": str(accelerator.device),
        "versions": {
            "edgekit": edgekit.__version__,
            "torch": str(torch.__version__),
            "code": prepared.code if prepared else code_version(),
        },
        "data": {"name": dataset.name, "sha256": dataset.sha256},
        "teacher": about_teacher,
    }
    run.save_info(info)
    method = METHODS[recipe.method.name]
    inner = Inner(recipe.inner.epsilon, recipe.inner.step_size, recipe.inner.steps)
    options = {key: getattr(recipe.method, key) for key in method.options}
    pool = dataset.train.to(accelerator.device)
    held_out = dataset.validation
    held_out = held_out[data.stratified(held_out.labels, recipe.evaluate.samples, recipe.seed)].to(accelerator.device)
    steps = max(1, len(pool) // train.batch_size)
    with progress() as bar:
        task = bar.add_task(printable(name), total=train.epochs * steps, completed=len(log) * steps, note="")
        for epoch in range(len(log), train.epochs):
            begin, total, model = time.perf_counter(), torch.zeros((), device=accelerator.device), model.train()
            # The last, incomplete batch is left out: its statistics would weigh as much as a whole one's.
            order = torch.randperm(
                len(pool), generator=torch.Generator().manual_seed(_number(recipe.seed, _ORDER, epoch))
            )
            for step in range(steps):
                if prepared:
                    prepared.before_step(epoch * steps + step, train.epochs * steps)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(train, (epoch + step / steps) / train.epochs)
                batch = pool[order[step * train.batch_size : (step + 1) * train.batch_size].to(accelerator.device)]
                seeds = derive(recipe.seed, _AUGMENT, epoch, samples=batch.index)
                images = data.augment(batch.images, seeds, recipe.data.pad, recipe.data.flip).to(torch.float32) / 255
                images = images.contiguous(memory_format=layout)
                seeds = derive(recipe.seed, _INNER, epoch, samples=batch.index)
                with accelerator.autocast():
                    loss = method.loss(model, teacher, images, batch.labels, inner=inner, seeds=seeds, **options).mean()
                optimizer.zero_grad()
                accelerator.backward(loss)
                if train.gradient_clip:
                    accelerator.clip_grad_norm_(model.parameters(), train.gradient_clip)
                optimizer.step()
                total += loss.detach()
                bar.advance(task)
            mean_loss = total.item() / steps
            if not math.isfinite(mean_loss):
                raise EdgekitError(
                    f"the loss is {mean_loss} in epoch {epoch + 1}",
                    where=run.folder,
                    mend=prepared.mend if prepared else "Lower train.learning_rate, or set train.gradient_clip=1",
                )
            line = {"epoch": epoch + 1, "loss": mean_loss}
            line["images_per_second"] = steps * train.batch_size / (time.perf_counter() - begin)
            if (epoch + 1) % recipe.evaluate.every == 0 or epoch + 1 == train.epochs:
                line |= _validate(student, held_out, recipe)
                if not best or (line["robust_accuracy"], line["clean_accuracy"]) > (
                    best["robust_accuracy"],
                    best["clean_accuracy"],
                ):
                    weights = {name: value.detach().cpu().clone() for name, value in student.state_dict().items()}
                    best = {"epoch": epoch + 1, "student": weights}
                    best |= {key: line[key] for key in ("clean_accuracy", "robust_accuracy")}
            line["seconds"] = time.perf_counter() - begin
            log.append(line)
            note = f"loss {mean_loss:.4f}, {line['images_per_second']:.0f} images/s"
            if best:
                note += f", best robust {100 * best['robust_accuracy']:.1f} %"
            bar.update(task, note=note)
            if bar.disable and (epoch + 1) % max(1, train.epochs // 10) == 0:
                say(f"{name}: epoch {epoch + 1} of {train.epochs}, {note}")
            _save_checkpoint(run, student, optimizer, log, best, dataset.sha256, accelerator.scaler)
    models.save(student, run.student, best["student"], seed=str(recipe.seed), recipe_sha256=sha256(run.recipe_file))
    curves.draw(log, run.folder / "curves.png")
    info |= {
        "status": "finished",
        "metrics": {key: best[key] for key in ("epoch", "clean_accuracy", "robust_accuracy")} | {"split": "validation"},
        "student_sha256": sha256(run.student),
        "seconds": sum(line["seconds"] for line in log),
    }
    run.save_info(info)
    return info


def _number(seed: int, *steps: int) -> int:
    """One number for torch's own generators, out of a seed and its purpose."""
    return int(derive(seed, *steps, samples=torch.zeros(1, dtype=torch.int64)).item()) & (2**63 - 1)


def _threads(recipe: Recipe, student: Network, dataset: Dataset, device: torch.device) -> int:
    if device.type != "cpu":
        return torch.get_num_threads()
    layout = torch.channels_last if recipe.train.channels_last else torch.contiguous_format
    images = dataset.train.images[:1].expand(recipe.train.batch_size, -1, -1, -1).to(torch.float32) / 255
    images = images.contiguous(memory_format=layout)
    probe = models.build(
        student.spec, dataset.classes, dataset.input_shape, [0.5] * images.shape[1], [0.25] * images.shape[1]
    )
    probe.to(memory_format=layout)

    def work() -> None:
        for _ in range(3):
            probe(images).sum().backward()

    return machine.threads(f"{student.spec.model_dump_json()} {tuple(images.shape)} {layout}", work)


def _validate(student: Network, split: Split, recipe: Recipe) -> dict[str, float]:
    """Clean accuracy, and robust accuracy under PGD with the recipe's epsilon and a quarter of it as step."""
    answering = fold(student.eval())
    clean = robust = 0
    for start in range(0, len(split), 250):
        chunk = split[slice(start, start + 250)]
        images = chunk.floats()
        with torch.no_grad():
            clean += int((answering(images).argmax(1) == chunk.labels).sum())
        seeds = derive(recipe.seed, _VALIDATE, samples=chunk.index)
        epsilon = recipe.inner.epsilon
        _, fooled = pgd(
            answering,
            answering,
            images,
            chunk.labels,
            seeds=seeds,
            epsilon=epsilon,
            step_size=epsilon / 4,
            steps=recipe.evaluate.steps,
        )
        robust += int((~fooled).sum())
    student.train()
    return {"clean_accuracy": clean / len(split), "robust_accuracy": robust / len(split)}


def _save_checkpoint(
    run: Run,
    student: nn.Module,
    optimizer: Any,
    log: list[dict[str, Any]],
    best: dict[str, Any],
    data_sha256: str,
    scaler: Any = None,
) -> None:
    state = {
        "student": student.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),  # fp16's loss scale, which grows and shrinks
        "log": log,
        "best": best,
        "data": data_sha256,
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with writing(run.checkpoint) as part:
        # Through memory: torch's own writer reports a full disk, now and then, as a fault of its archive.
        part.write_bytes(buffer.getbuffer())
    # After the checkpoint and out of it: a kill between the two writes loses a line that the next epoch writes again.
    write_text(run.folder / "log.jsonl", "".join(json.dumps(line) + "\n" for line in log))


# What torch.load and load_state_dict raise on a file that is cut off, overwritten or of another network.
_DAMAGED = (pickle.UnpicklingError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError)


def _load_checkpoint(run: Run) -> dict[str, Any] | None:
    if not run.checkpoint.is_file():
        return None
    try:
        # Through memory here too: from a file torch reports one that is cut off as a fault of the disk.
        state = torch.load(io.BytesIO(run.checkpoint.read_bytes()), map_location="cpu", weights_only=True)
        if isinstance(state, dict) and state.keys() >= {"student", "optimizer", "scaler", "log", "best", "data"}:
            return state
        raise ValueError("a part is missing")
    except _DAMAGED as error:
        raise _damaged(run, error) from None


def _restore(
    run: Run, state: dict[str, Any], student: nn.Module, optimizer: Any, scaler: Any
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Put a checkpoint back into what is trained, and return its log and its best epoch."""
    try:
        student.load_state_dict(state["student"])
        optimizer.load_state_dict(state["optimizer"])
        if scaler is not None:
            scaler.load_state_dict(state["scaler"])
    except _DAMAGED as error:
        raise _damaged(run, error) from None
    return state["log"], state["best"]


def _damaged(run: Run, error: Exception) -> EdgekitError:
    return EdgekitError(
        f"the checkpoint cannot be read ({type(error).__name__})", where=run.checkpoint, mend="Start a new run"
    )
