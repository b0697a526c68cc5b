"""Attacks x artifacts -> Verdict: every file of a run is attacked in its own runtime, beside the float student.

`verify` is the command. What happens to one file stands in examine.py, what is kept of it in archive.py.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgekit import archive, foreign, judge, machine, models, runs, twin, verdict
from edgekit import artifact as artifacts
from edgekit.artifact import Artifact
from edgekit.attacks import Attack, parse
from edgekit.attacks.campaign import Outcome
from edgekit.classifier import Classifier
from edgekit.console import progress, say
from edgekit.data import Dataset, Split, stratified
from edgekit.data import load as load_data
from edgekit.errors import ENVIRONMENT, EdgekitError, printable
from edgekit.examine import Advance, Beside, Examined, Subject, Trial, examine, share
from edgekit.files import sha256
from edgekit.foreign import Said
from edgekit.recipe import number, read
from edgekit.runs import Run
from edgekit.statistics import power_sentence
from edgekit.verdict import ArtifactVerdict, FloatStudent, Rules

SAMPLES = 1000
SPLIT = "test"
OWN_VERDICTS = Path("edgekit-verdicts")  # of files that belong to no run


@dataclass(frozen=True)
class Entry:
    """One file to be judged: what the verdict says of it, and how it is opened once its turn comes."""

    about: dict[str, Any]
    subject: Callable[[], Subject]


@dataclass(frozen=True)
class Assignment:
    """All that is to be judged, on which images, beside which student, and where the verdict is kept.

    `classes` are their names where they are known, in the order of the scores.
    """

    entries: list[Entry]
    split: Split
    data: verdict.Data
    epsilon: float
    threads: int
    verdicts: Path
    student: Classifier | None = None
    classes: tuple[str, ...] | None = None


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
    data: str | Path | None = None,
    source: str | Path | None = None,
    mean: str | None = None,
    std: str | None = None,
    layout: str | None = None,
    channels: str | None = None,
    output: str | None = None,
    classes: str | Path | None = None,
    resize: bool = False,
    size: int | None = None,
) -> dict[str, Any]:
    """Attack exported files in their own runtimes and say whether the robustness of their student survived in them.

    Args:
        what: a run folder, one artifact folder of a run, or an ONNX file; every artifact of the latest run by default.
        attack: names as attacks.parse takes them, separated by commas; robust accuracy is the worst case over all.
        samples: test images, a seeded, stratified draw; 1,000, or all where there are fewer.
        epsilon: radius in [0, 1] pixels, a number or a fraction such as "8/255"; the recipe's by default, else 8/255.
        norm: "Linf".
        tolerance, clean_tolerance: the loss of robust and clean accuracy that is borne, as fractions.
        at_least: the robust accuracy that each file must reach as well, a fraction.
        seed: of the draw of samples and of every attack.
        save_adversarial: an .npz file for the adversarial images (CLI.md).
        data: FOLDER/CLASS/* or FOLDER/test/CLASS/*: the photos for an ONNX file that belongs to no run.
        source: a model whose gradients are followed as well: student.safetensors, or an ONNX file.
        mean, std, layout, channels, output, classes, resize, size: what an ONNX file does not say of itself, as
            foreign.Said explains.
    Returns:
        The document that `--json` prints; it is also kept as verdicts/<n>/verdict.json in the run's folder, or in
        edgekit-verdicts/<n>/ for a file of no run.
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
    torch.set_flush_denormal(True)
    said = Said(mean, std, layout, channels, output, None if classes is None else Path(classes), resize, size)
    path = None if what is None else Path(what)
    if path is not None and data is not None and (path / "artifact.json").is_file():
        path = artifacts.load(path).path  # an artifact away from its run is a file like any other
    if path is not None and path.is_file() and (data is not None or not (path.parent / "artifact.json").is_file()):
        assignment = _of_file(path, None if data is None else Path(data), said, samples, seed, radius)
    else:
        if given := [*(["--data"] if data is not None else []), *said.options()]:
            raise EdgekitError("is for a file that belongs to no run; a run has its own data", where=given[0])
        assignment = _of_run(path, samples, seed, radius)
    trial = Trial(
        attacks,
        assignment.split.floats(),
        assignment.split.labels,
        assignment.split.index,
        assignment.epsilon,
        seed,
    )
    if assignment.student is not None:
        say(power_sentence(len(trial.labels), rules.tolerance, rules.clean_tolerance))
    with contextlib.ExitStack() as stack:
        stack.enter_context(_torch_threads(assignment.threads))
        surrogates = {} if source is None else _surrogate(Path(source), assignment)
        archived = stack.enter_context(archive.adversarial(save_adversarial, trial)) if save_adversarial else None
        result, lines = _examine_all(assignment, surrogates, trial, rules, archived)
        document = verdict.summarize(
            rules,
            result.artifacts,
            attacks=[one.name for one in attacks],
            norm="Linf",
            epsilon=trial.epsilon,
            samples=len(trial.labels),
            seed=seed,
            data=assignment.data,
            machine=verdict.Machine(**judge.machine_block()),
            float_student=result.float_student,
            looks=archive.looks(
                assignment.verdicts, [one.about["sha256"] for one in assignment.entries], assignment.data.sha256
            ),
        )
    return archive.keep(assignment.verdicts, document, lines)


def _of_run(path: Path | None, samples: int | None, seed: int, radius: float | None) -> Assignment:
    """The artifacts of a run, or one of them, on the run's own test images."""
    run, found = _found(path)
    recipe = read(run.recipe_file)
    dataset = _same_data(run, recipe.data)
    split = dataset.test[stratified(dataset.test.labels, samples or SAMPLES, seed)]
    _few(split, samples)
    threads = min(run.info().get("threads", 1), machine.cores())
    # The channels-last layout halves the time of a convolution's two passes on a CPU.
    student = models.load(run.student).requires_grad_(False).to(memory_format=torch.channels_last)
    return Assignment(
        entries=[Entry(_about(run, one), partial(_subject, run, one, threads)) for one in found],
        split=split,
        data=verdict.Data(dataset.name, SPLIT, dataset.sha256),
        epsilon=recipe.inner.epsilon if radius is None else radius,
        threads=threads,
        verdicts=run.verdicts,
        student=student,
        classes=student.classes,
    )


def _of_file(
    path: Path, folder: Path | None, said: Said, samples: int | None, seed: int, radius: float | None
) -> Assignment:
    """An ONNX file that belongs to no run, on a folder of photos."""
    model = foreign.read(path)
    port = foreign.port(path, model, said)
    if folder is None:
        raise EdgekitError(
            "this file belongs to no run: it needs photos to be judged on", where=path, mend="Say --data FOLDER"
        )
    opened = partial(judge.open, path, threads=machine.cores(), output=port.output)
    classes = port.classes or foreign.count_classes(path, port, opened(), said)
    photos = foreign.photos(folder, port, classes, said, samples or SAMPLES, seed)
    _few(photos.split, samples)
    threads = machine.cores()
    about = {
        "name": path.stem,
        "format": "onnx",
        "precision": foreign.precision(model),
        "file": path.name,
        "bytes": path.stat().st_size,
        "sha256": foreign.fingerprint(path, foreign.external(model)),
    }

    def subject() -> Subject:
        copy = foreign.twin(path, port)
        return Subject(
            **about,
            judged_on=judge.judged_on("onnx"),
            open=lambda: foreign.Ported(port, opened(), differentiable=False),
            twin=copy,
            chance=1 / classes,
        )

    return Assignment(
        entries=[Entry(about, subject)],
        split=photos.split,
        data=verdict.Data(photos.name, SPLIT, photos.sha256),
        epsilon=8 / 255 if radius is None else radius,
        threads=threads,
        verdicts=OWN_VERDICTS,
        classes=port.names,
    )


def _few(split: Split, samples: int | None) -> None:
    if samples is not None and len(split) < samples:
        say(f"There are {len(split):,} test images; all of them are drawn.")


def _surrogate(path: Path, assignment: Assignment) -> dict[str, Classifier]:
    """The model of --source by its file's name: another network whose gradients the attacks follow too."""
    if path.suffix == ".safetensors":
        network = models.load(path).requires_grad_(False).to(memory_format=torch.channels_last)
    else:
        model = foreign.read(path)
        port = foreign.port(path, model, Said())
        network = foreign.twin(path, port)
        if network is None:
            raise EdgekitError("no gradients go through this file", where=f"--source {path}")
    images = assignment.split.images[:2].float() / 255
    try:
        with torch.no_grad():
            network(images)
    except RuntimeError as error:
        raise EdgekitError(
            f"does not take these images ({str(error).splitlines()[0][:120]})", where=f"--source {path}"
        ) from None
    return {path.stem: network}


@dataclass(frozen=True)
class _Results:
    artifacts: list[ArtifactVerdict]
    float_student: FloatStudent | None


def _examine_all(
    assignment: Assignment,
    surrogates: dict[str, Classifier],
    trial: Trial,
    rules: Rules,
    archived: Callable[[str, Examined], None] | None,
) -> tuple[_Results, list[dict[str, Any]]]:
    """Examine every file; also the lines of samples.jsonl."""
    with progress() as bar:

        def watch(name: str, sources: int) -> Advance:
            tasks: dict[str, Any] = {}

            def advance(attack: Attack, samples: int) -> None:
                if attack.name not in tasks:
                    total = (sources if attack.gradients else 1) * len(trial.labels)
                    tasks[attack.name] = bar.add_task(f"{printable(name)}, {attack.name}", total=total, note="")
                bar.update(tasks[attack.name], advance=samples)

            return advance

        own = None
        if (student := assignment.student) is not None:
            own = trial.run(student, {"float": student} | surrogates, watch("float student", 1 + len(surrogates)))
            if bar.disable:
                say(f"float student: {_percent(own.robust)} robust under its own gradients")
        verdicts: list[ArtifactVerdict] = []
        lines: list[dict[str, Any]] = []
        for entry in assignment.entries:
            name = entry.about["name"]
            try:
                subject = entry.subject()
            except EdgekitError as error:
                if error.exit_code != ENVIRONMENT:
                    raise
                verdicts.append(verdict.not_run(**entry.about, why=str(error)))
                continue
            beside = None if student is None or own is None else Beside(student, own)
            examined = examine(subject, beside, trial, rules, surrogates, watch)
            if bar.disable:
                seconds = sum(examined.outcome.seconds.values())
                say(f"{name}: {_percent(examined.outcome.robust)} robust ({seconds:.1f} s)")
            verdicts.append(examined.verdict)
            lines += archive.lines(name, trial, own, examined)
            if archived:
                archived(name, examined)
    if not lines:
        raise EdgekitError(f"nothing could run here ({verdicts[0].why})", exit_code=ENVIRONMENT)
    return _Results(verdicts, None if own is None else _float_student(own, trial, rules)), lines


def _float_student(own: Outcome, trial: Trial, rules: Rules) -> FloatStudent:
    clean = own.clean.argmax(1) == trial.labels
    return FloatStudent(verdict.accuracy(clean, rules.confidence), verdict.accuracy(own.robust, rules.confidence))


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


def _found(path: Path | None) -> tuple[Run, list[Artifact]]:
    """The run and those of its artifacts that are meant, each checked against its digest and against the student."""
    path = None if path == runs.ROOT / "latest" else path
    if path is not None and not path.exists():
        raise EdgekitError("there is no such run or artifact", where=path)
    if path is not None and path.is_file():  # a file of an artifact is that artifact
        judged = artifacts.load(path.parent).path
        if path.name != judged.name:
            say(f"{path.name} is {judged.name} for another loader; {judged.name} is judged")
        path = path.parent
    if path is not None and (path / "artifact.json").is_file():
        folder = path.resolve()
        if folder.parent.name != "artifacts" or not (folder.parents[1] / "run.json").is_file():
            raise EdgekitError(
                "this artifact lies in no run, and so has no student and no data beside it",
                where=path,
                mend="Say --data FOLDER",
            )
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


def _same_data(run: Run, spec: Any) -> Dataset:
    dataset = load_data(spec)
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
