"""The one training loop: any method, any model, resumable to the same weights."""

import functools
import hashlib
import io
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

import edgekit
from edgekit import data, machine, models, runs
from edgekit.attacks.pgd import pgd
from edgekit.console import progress, say
from edgekit.data import Dataset, Split
from edgekit.errors import EdgekitError, choose
from edgekit.files import cache_folder, digest, sha256, write_text, writing
from edgekit.methods import METHODS
from edgekit.methods.inner import Inner
from edgekit.models import Network
from edgekit.models.fold import fold
from edgekit.randomness import derive
from edgekit.recipe import Recipe, Train, read, split_override, to_toml
from edgekit.report import curves
from edgekit.runs import Run

# Purposes of a seed: what is drawn for one must never repeat what is drawn for another.
_INIT, _ORDER, _AUGMENT, _INNER, _VALIDATE = range(5)


def distill(
    recipe: str | Path,
    *,
    overrides: Sequence[str] = (),
    run: str | Path | None = None,
    resume: bool = False,
    device: str | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """Train the student that `recipe` describes, and first its teacher where that is not trained yet.

    Args:
        recipe: a recipe file; looked for here, then among the shipped ones.
        overrides: such as "train.epochs=5".
        run: the run folder; by default the first free runs/<recipe>-<n>.
        resume: continue a run (by default the newest of this recipe); with its recorded recipe, seed and threads.
        device: cpu, cuda, cuda:1, mps; by default a GPU where there is one.
    Returns:
        run.json's content, and "run": the folder.
    Raises:
        EdgekitError: bad input, said in one sentence.
    """
    stem = Path(recipe).stem
    folder = Path(run) if run is not None else None
    found = (Run(folder) if folder else runs.newest(stem)) if resume else None
    if found and found.recipe_file.is_file():
        current, plan = found, _resumed(found, overrides, seed)
    else:
        plan = read(recipe, overrides, seed)
        choose(METHODS, plan.method.name, "method", where=recipe)
        if METHODS[plan.method.name].needs_teacher and plan.teacher is None:
            raise EdgekitError(
                f"the method '{plan.method.name}' needs a teacher", where=recipe, mend="Add a table [teacher]"
            )
        current = None
    if current and current.finished:
        say(f"{current.folder} has finished already")
        return {"run": str(current.folder), **current.info()}
    # Denormals make a convolution many times slower, and threads started later inherit the setting.
    torch.set_flush_denormal(True)
    where = machine.device(device)
    dataset = data.load(plan.data)  # before the run folder is made: bad input must leave nothing behind
    teacher, about_teacher = _teacher(plan, dataset, where)
    if current is None:
        # A folder in which nothing was saved yet is started from its beginning.
        current = found if found and not any(found.folder.iterdir()) else runs.create(stem, folder)
        write_text(current.recipe_file, to_toml(plan))
    try:
        info = fit(plan, dataset, teacher, current, where, about_teacher)
    except KeyboardInterrupt:
        say(f"Interrupted. Continue with: {runs.continue_command(current)}")
        raise
    if folder is None:
        runs.set_latest(current)
    return {"run": str(current.folder), **info}


def _resumed(run: Run, overrides: Sequence[str], seed: int | None) -> Recipe:
    """The recorded recipe of `run`; what is asked for again must say the same."""
    recorded = read(run.recipe_file)
    again = read(run.recipe_file, overrides, seed)
    if again != recorded:
        for override in overrides:
            key, _ = split_override(override)
            if read(run.recipe_file, [override]) != recorded:
                raise EdgekitError(
                    f"the run was started with another '{'.'.join(key)}'",
                    where=f"--set {override}",
                    mend="Leave it out, or start a new run",
                )
        raise EdgekitError(
            f"the run was started with seed {recorded.seed}",
            where=f"--seed {seed}",
            mend="Leave it out, or start a new run",
        )
    return recorded


def _teacher(recipe: Recipe, dataset: Dataset, device: torch.device) -> tuple[Network | None, dict[str, str] | None]:
    """The frozen teacher and what run.json says of it; trained first where its recipe has no result in the cache."""
    if recipe.teacher is None or not METHODS[recipe.method.name].needs_teacher:
        return None, None
    if recipe.teacher.weights is not None:
        path = Path(recipe.teacher.weights)
    else:
        named = recipe.teacher.recipe or ""
        # The student's data decides: with another split the teacher would have seen its validation images.
        plan = read(named).model_copy(update={"data": recipe.data})
        if plan.teacher is not None:
            raise EdgekitError("the recipe of a teacher cannot itself have a teacher", where=named)
        kept = Run(cache_folder() / "teachers" / digest(to_toml(plan), dataset.sha256, code_version())[:16])
        if not kept.finished:
            say(f"The teacher ({named}) is trained first; it is kept for later runs")
            kept.folder.mkdir(parents=True, exist_ok=True)
            write_text(kept.recipe_file, to_toml(plan))
            fit(plan, dataset, None, kept, device, None)
        path = kept.student
    teacher = models.load(path)
    if teacher.classes != dataset.classes:
        problem = f"the teacher knows {len(teacher.classes)} classes, the data has {len(dataset.classes)}"
        if len(teacher.classes) == len(dataset.classes):
            problem = "the teacher's classes have other names than the data's"
        raise EdgekitError(problem, where=path, mend="Name another teacher")
    if teacher.input_shape != dataset.input_shape:
        raise EdgekitError(
            f"the teacher takes {teacher.input_shape} images, the data has {dataset.input_shape}", where=path
        )
    return teacher.to(device).requires_grad_(False), {"file": path.name, "sha256": sha256(path)}


@functools.cache
def code_version() -> str:
    """A digest of the sources that decide what a recipe trains to."""
    root = Path(__file__).parent
    names = ["train.py", "data.py", "randomness.py", "recipe.py", "attacks/pgd.py", "attacks/losses.py"]
    sources = [root / name for name in names] + sorted([*root.glob("methods/*.py"), *root.glob("models/*.py")])
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


def learning_rate(train: Train, progress: float) -> float:
    """The rate at `progress` in [0, 1] of the run: linear warm-up, then steps at the milestones or half a cosine."""
    if progress < train.warmup:
        return train.learning_rate * (progress / train.warmup)
    if train.schedule == "cosine":
        return train.learning_rate * 0.5 * (1 + math.cos(math.pi * (progress - train.warmup) / (1 - train.warmup)))
    return train.learning_rate * train.gamma ** sum(progress >= milestone for milestone in train.milestones)


def fit(
    recipe: Recipe,
    dataset: Dataset,
    teacher: Network | None,
    run: Run,
    device: torch.device,
    about_teacher: dict[str, str] | None,
) -> dict[str, Any]:
    """Train into `run`, from its checkpoint where it has one, and return run.json's content."""
    train = recipe.train
    precision = {"fp32": "no"}.get(train.precision, train.precision)
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=precision)
    mean, std = dataset.statistics()
    student = models.build(
        recipe.student, dataset.classes, dataset.input_shape, mean, std, seed=_number(recipe.seed, _INIT)
    )
    layout = torch.channels_last if train.channels_last else torch.contiguous_format
    student = student.to(accelerator.device).to(memory_format=layout)
    if teacher is not None:
        teacher = fold(teacher.to(accelerator.device).to(memory_format=layout).eval())
    decayed = [parameter for parameter in student.parameters()]
    optimizer = torch.optim.SGD(decayed, train.learning_rate, train.momentum, weight_decay=train.weight_decay)
    info = run.info() or {"threads": _threads(recipe, student, dataset, accelerator.device)}
    torch.set_num_threads(info["threads"])
    state = _load_checkpoint(run)
    if state:
        student.load_state_dict(state["student"])
        optimizer.load_state_dict(state["optimizer"])
    log: list[dict[str, Any]] = state["log"] if state else []
    best: dict[str, Any] = state["best"] if state else {}
    info |= {
        "schema": 1,
        "status": "running",
        "seed": recipe.seed,
        "device": str(accelerator.device),
        "versions": {"edgekit": edgekit.__version__, "torch": str(torch.__version__), "code": code_version()},
        "data": {"name": dataset.name, "sha256": dataset.sha256},
        "teacher": about_teacher,
    }
    if state and state["data"] != dataset.sha256:
        raise EdgekitError(
            "the data has changed since the run was started", where=recipe.data.name, mend="Start a new run"
        )
    run.save_info(info)
    model, optimizer = accelerator.prepare(student, optimizer)
    method = METHODS[recipe.method.name]
    inner = Inner(recipe.inner.epsilon, recipe.inner.step_size, recipe.inner.steps)
    options = {key: getattr(recipe.method, key) for key in method.options}
    pool = dataset.train.to(accelerator.device)
    held_out = dataset.validation
    held_out = held_out[data.stratified(held_out.labels, recipe.evaluate.samples, recipe.seed)].to(accelerator.device)
    steps = max(1, len(pool) // train.batch_size)
    with progress() as bar:
        task = bar.add_task(run.name, total=train.epochs * steps, completed=len(log) * steps, note="")
        for epoch in range(len(log), train.epochs):
            begin, total, model = time.perf_counter(), torch.zeros((), device=accelerator.device), model.train()
            # The last, incomplete batch is left out: its statistics would weigh as much as a whole one's.
            order = torch.randperm(
                len(pool), generator=torch.Generator().manual_seed(_number(recipe.seed, _ORDER, epoch))
            )
            for step in range(steps):
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
                    mend="Lower train.learning_rate, or set train.gradient_clip=1",
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
                say(f"{run.name}: epoch {epoch + 1} of {train.epochs}, {note}")
            _save_checkpoint(run, student, optimizer, log, best, dataset.sha256)
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
    images = dataset.train.images[:1].expand(recipe.train.batch_size, -1, -1, -1).to(torch.float32) / 255
    images = images.contiguous(
        memory_format=torch.channels_last if recipe.train.channels_last else torch.contiguous_format
    )
    probe = models.build(
        student.spec, dataset.classes, dataset.input_shape, [0.5] * images.shape[1], [0.25] * images.shape[1]
    )
    probe.to(memory_format=torch.channels_last)

    def work() -> None:
        for _ in range(3):
            probe(images).sum().backward()

    return machine.threads(f"{student.spec.model_dump_json()} {tuple(images.shape)}", work)


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
    run: Run, student: nn.Module, optimizer: Any, log: list[dict[str, Any]], best: dict[str, Any], data_sha256: str
) -> None:
    state = {
        "student": student.state_dict(),
        "optimizer": optimizer.state_dict(),
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


def _load_checkpoint(run: Run) -> dict[str, Any] | None:
    if not run.checkpoint.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(run.checkpoint, map_location="cpu", weights_only=True)
        _: Tensor = next(iter(state["student"].values()))
        return state
    except (RuntimeError, ValueError, KeyError, EOFError, OSError) as error:
        raise EdgekitError(
            f"the checkpoint cannot be read ({type(error).__name__})", where=run.checkpoint, mend="Start a new run"
        ) from None
