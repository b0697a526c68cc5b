"""Attacks x artifacts -> Verdict: every file of a run is attacked in its own runtime, beside the float student.

`verify` is the command. What happens to one file stands in examine.py, what is kept of it in archive.py.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgekit import archive, data, judge, machine, models, runs, twin, verdict
from edgekit import artifact as artifacts
from edgekit.artifact import Artifact
from edgekit.attacks import Attack, parse
from edgekit.classifier import Classifier
from edgekit.console import progress, say
from edgekit.errors import ENVIRONMENT, EdgekitError
from edgekit.examine import Advance, Examined, Subject, Trial, examine, share
from edgekit.files import sha256
from edgekit.recipe import number, read
from edgekit.runs import Run
from edgekit.statistics import power_sentence
from edgekit.verdict import ArtifactVerdict, FloatStudent, Rules

SAMPLES = 1000
SPLIT = "test"


def verify(
    what: str | Path | None = None,
    *,
    attack: str = "pgd20",
    samples: int | None = None,
    epsilon: float | str | None = None,
    norm: str | None = None,
    tolerance: float = 0.02,
    clean_tolerance: float = 0.02,
    at_least: float | None = None,
    seed: int = 0,
    save_adversarial: str | Path | None = None,
) -> dict[str, Any]:
    """Attack exported files in their own runtimes and say whether the student's robustness survived in them.

    Args:
        what: a run folder, or one artifact folder of a run; every artifact of the latest run by default.
        attack: names as attacks.parse takes them, separated by commas; robust accuracy is the worst case over all.
        samples: test images, a seeded, stratified draw; 1,000, or all where there are fewer.
        epsilon: radius in [0, 1] pixels, a number or a fraction such as "8/255"; the recipe's by default.
        norm: "Linf".
        tolerance, clean_tolerance: the loss of robust and clean accuracy that is borne, as fractions.
        at_least: the robust accuracy that each file must reach as well, a fraction.
        seed: of the draw of samples and of every attack.
        save_adversarial: an .npz file for the adversarial images (CLI.md).
    Returns:
        The document that `--json` prints; it is also kept as verdicts/<n>/verdict.json in the run's folder.
    Raises:
        EdgekitError: impossible options, nothing to verify, or a file, student or data that changed since the export.
    """
    attacks = parse(attack)
    rules = _rules(tolerance, clean_tolerance, at_least)
    if (norm or "Linf") != "Linf":
        raise EdgekitError(f"the norm '{norm}' is not there in this version", where="--norm", mend="Known: Linf")
    if samples is not None and samples < 1:
        raise EdgekitError("at least one sample is needed", where=f"--samples {samples}")
    if not 0 <= seed < 2**31:
        raise EdgekitError("a seed goes from 0 to 2,147,483,647", where=f"--seed {seed}")
    radius = None if epsilon is None else _radius(epsilon)
    run, found = _found(what)
    recipe = read(run.recipe_file)
    dataset = _same_data(run, recipe.data)
    split = dataset.test[data.stratified(dataset.test.labels, samples or SAMPLES, seed)]
    if samples is not None and len(split) < samples:
        say(f"There are {len(split):,} test images; all of them are drawn.")
    trial = Trial(
        attacks, split.floats(), split.labels, split.index, recipe.inner.epsilon if radius is None else radius, seed
    )
    say(power_sentence(len(split), rules.tolerance, rules.clean_tolerance))
    with contextlib.ExitStack() as stack:
        threads = min(run.info().get("threads", 1), machine.cores())
        stack.enter_context(_torch_threads(threads))
        # The channels-last layout halves the time of a convolution's two passes on a CPU.
        student = models.load(run.student).requires_grad_(False).to(memory_format=torch.channels_last)
        archived = stack.enter_context(archive.adversarial(save_adversarial, trial)) if save_adversarial else None
        result, lines = _examine_all(run, found, student, trial, rules, archived, threads)
        document = verdict.summarize(
            rules,
            result.artifacts,
            attacks=[one.name for one in attacks],
            norm="Linf",
            epsilon=trial.epsilon,
            samples=len(split),
            seed=seed,
            data=verdict.Data(dataset.name, SPLIT, dataset.sha256),
            machine=verdict.Machine(**judge.machine_block()),
            float_student=result.float_student,
            looks=archive.looks(run.verdicts, [one.sha256 for one in found], dataset.sha256),
        )
    return archive.keep(run.verdicts, document, lines)


@dataclass(frozen=True)
class _Results:
    artifacts: list[ArtifactVerdict]
    float_student: FloatStudent


def _examine_all(
    run: Run,
    found: Sequence[Artifact],
    student: Classifier,
    trial: Trial,
    rules: Rules,
    archived: Callable[[str, Examined], None] | None,
    threads: int,
) -> tuple[_Results, list[dict[str, Any]]]:
    """Examine every artifact; also the lines of samples.jsonl."""
    with progress() as bar:

        def watch(name: str, sources: int) -> Advance:
            tasks: dict[str, Any] = {}

            def advance(attack: Attack, samples: int) -> None:
                if attack.name not in tasks:
                    total = (sources if attack.gradients else 1) * len(trial.labels)
                    tasks[attack.name] = bar.add_task(f"{name}, {attack.name}", total=total, note="")
                bar.update(tasks[attack.name], advance=samples)

            return advance

        torch.set_flush_denormal(True)
        own = trial.run(student, {"float": student}, watch("float student", 1))
        if bar.disable:
            say(f"float student: {_percent(own.robust)} robust under its own gradients")
        verdicts: list[ArtifactVerdict] = []
        lines: list[dict[str, Any]] = []
        for one in found:
            try:
                subject = _subject(run, one, threads)
            except EdgekitError as error:
                if error.exit_code != ENVIRONMENT:
                    raise
                verdicts.append(verdict.not_run(**_about(run, one), why=str(error)))
                continue
            examined = examine(subject, student, own, trial, rules, watch)
            if bar.disable:
                seconds = sum(examined.outcome.seconds.values())
                say(f"{one.name}: {_percent(examined.outcome.robust)} robust ({seconds:.1f} s)")
            verdicts.append(examined.verdict)
            lines += archive.lines(one.name, trial, own, examined)
            if archived:
                archived(one.name, examined)
    if not lines:
        raise EdgekitError(f"nothing could run here ({verdicts[0].why})", exit_code=ENVIRONMENT)
    clean = own.clean.argmax(1) == trial.labels
    float_student = FloatStudent(
        verdict.accuracy(clean, rules.confidence), verdict.accuracy(own.robust, rules.confidence)
    )
    return _Results(verdicts, float_student), lines


def _percent(right: Tensor) -> str:
    return f"{100 * share(right):.1f} %"


def _rules(tolerance: float, clean_tolerance: float, at_least: float | None) -> Rules:
    named = {"--tolerance": tolerance, "--clean-tolerance": clean_tolerance, "--at-least": at_least}
    for option, value in named.items():
        if value is not None and not 0 <= value <= 1:
            raise EdgekitError(f"should be between 0 and 100 points, not {100 * value:g}", where=option)
    return Rules(tolerance, clean_tolerance, at_least)


def _radius(epsilon: float | str) -> float:
    try:
        value = float(number(epsilon))
    except (ValueError, OverflowError):
        raise EdgekitError("should be a number or a fraction such as 8/255", where=f"--epsilon {epsilon}") from None
    if not 0 < value <= 1:
        mend = "Pixels go from 0 to 1; write 8/255 for eight of 255 levels" if value > 1 else None
        raise EdgekitError("an Linf epsilon is above 0 and at most 1", where=f"--epsilon {epsilon}", mend=mend)
    return value


def _found(what: str | Path | None) -> tuple[Run, list[Artifact]]:
    """The run and those of its artifacts that are meant, each checked against its digest and against the student."""
    path = None if what is None or Path(what) == runs.ROOT / "latest" else Path(what)
    if path is not None and not path.exists():
        raise EdgekitError("there is no such run or artifact", where=path)
    if path is not None and path.is_file():
        beside = (path.parent / "artifact.json").is_file()
        raise EdgekitError(
            "this version verifies the artifacts of a run, not a file by itself",
            where=path,
            mend=f"Run: edgekit verify {path.parent if beside else 'RUN'}",
        )
    if path is not None and (path / "artifact.json").is_file():
        folder = path.resolve()
        if folder.parent.name != "artifacts" or not (folder.parents[1] / "run.json").is_file():
            raise EdgekitError("this artifact lies in no run, and so has no student beside it", where=path)
        run, folders = runs.find(folder.parents[1]), [folder]
    else:
        run = runs.find(path)
        inside = sorted(run.artifacts.iterdir()) if run.artifacts.is_dir() else []
        folders = [folder for folder in inside if folder.is_dir() and not folder.name.startswith(".")]
    if not folders:
        mend = "Run: edgekit export" + ("" if path is None else f" {path}") + " --int8"
        raise EdgekitError("there is no exported file yet", where=run.folder, mend=mend)
    found = [artifacts.load(folder) for folder in folders]
    student, recipe = sha256(run.student), sha256(run.recipe_file)
    for one in found:
        if one.record.get("made_from", {}).get("student_sha256") != student:
            raise EdgekitError(
                "the file was exported from another student than the one beside it",
                where=one.folder,
                mend="Run: edgekit export --force",
            )
        if one.record["made_from"].get("recipe_sha256") != recipe:
            # Another split may hold training images as test images, and the data's digest does not see splits.
            raise EdgekitError("the recipe has changed since the export", where=run.recipe_file, mend="Train again")
    return run, found


def _same_data(run: Run, spec: Any) -> data.Dataset:
    dataset = data.load(spec)
    if dataset.sha256 != run.info()["data"]["sha256"]:
        # Another split may hold training images as test images.
        raise EdgekitError("the data has changed since the student was trained", where=dataset.name, mend="Train again")
    return dataset


def _about(run: Run, one: Artifact) -> dict[str, Any]:
    return {
        "name": one.name,
        "format": one.format,
        "precision": one.precision,
        "file": one.path.relative_to(run.folder).as_posix(),
        "bytes": one.bytes,
        "sha256": one.sha256,
    }


def _subject(run: Run, one: Artifact, threads: int) -> Subject:
    copy = twin.open(one.path) if (one.format, one.precision) == ("onnx", "int8") else None
    opener = partial(judge.open, one, threads=threads)
    opener()  # a missing runtime shows here, before anything is attacked
    return Subject(**_about(run, one), judged_on=judge.judged_on(one.format), open=opener, twin=copy)


@contextlib.contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
