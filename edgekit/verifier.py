"""Attacks x artifacts -> Verdict: every file of a run is attacked in its own runtime, beside the float student.

`verify` is the command. What happens to one file stands in examine.py, what is kept of it in archive.py.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgekit import __version__, archive, foreign, machine, models, runs, twin, verdict
from edgekit import artifact as artifacts
from edgekit import judge as judges
from edgekit.archive import Notebook
from edgekit.artifact import Artifact
from edgekit.attacks import Attack, parse
from edgekit.attacks.campaign import SCORES, TOGETHER, Outcome
from edgekit.checks import share
from edgekit.classifier import Classifier, predict
from edgekit.console import progress, say
from edgekit.data import Dataset, Split, stratified
from edgekit.data import load as load_data
from edgekit.errors import ENVIRONMENT, EdgekitError, printable
from edgekit.examine import Advance, Beside, Examined, Subject, Trial, examine
from edgekit.files import digest, sha256, write_text
from edgekit.foreign import Said
from edgekit.recipe import read, typed
from edgekit.report import page
from edgekit.report.evidence import Curves, Evidence, FileEvidence, gather
from edgekit.report.junit import to_xml
from edgekit.report.markdown import to_markdown
from edgekit.runs import Run
from edgekit.statistics import power_sentence
from edgekit.sweep import sweep
from edgekit.verdict import ArtifactVerdict, FloatStudent, Rules, Verdict

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

    `classes` are their names where they are known, in the order of the scores; `facts` are further digests, by name.
    """

    entries: list[Entry]
    split: Split
    data: verdict.Data
    epsilon: float
    threads: int
    verdicts: Path
    student: Classifier | None = None
    classes: tuple[str, ...] | None = None
    facts: dict[str, str] = field(default_factory=dict)
    port: foreign.Port | None = None  # how a file of no run is fed and read


def verify(
    what: str | Path | None = None,
    *,
    attack: str = "deployed",
    samples: int | None = None,
    epsilon: float | str | None = None,
    norm: str | None = None,
    tolerance: float = 0.02,
    clean_tolerance: float = 0.02,
    at_least: float | None = None,
    seed: int = 0,
    grid: bool = False,
    self_test: bool = False,
    resume: bool = False,
    save_adversarial: str | Path | None = None,
    report: str | Path | None = None,
    markdown: str | Path | None = None,
    junit: str | Path | None = None,
    judge: str | None = None,
    command: str = "",
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
        attack: names of attacks and suites as attacks.parse takes them, separated by commas; robust accuracy is the
            worst case over all.
        samples: test images, a seeded, stratified draw; 1,000, or all where there are fewer.
        epsilon: radius in [0, 1] pixels, a number or a fraction such as "8/255"; the recipe's by default, else 8/255.
        norm: "Linf", or "L2", whose epsilon has no default.
        tolerance, clean_tolerance: the loss of robust and clean accuracy that is borne, as fractions.
        at_least: the robust accuracy that each file must reach as well, a fraction.
        seed: of the draw of samples and of every attack.
        grid: only images of uint8 values, which a camera or a decoder can deliver, count as adversarial.
        self_test: also plant adversarial examples in a copy of each file and look whether the attacks find them.
        resume: continue what was interrupted under the same options; from the beginning where there is nothing.
        save_adversarial: an .npz file for the adversarial images (CLI.md).
        report: a copy of the HTML report; it then also holds accuracy against epsilon and steps, which takes a while.
        markdown, junit: the verdict for a pull request, and as JUnit XML for CI.
        judge: "tcp://HOST:PORT" or a command line: the program or device that answers in the place of one file.
        command: what was typed, for the report.
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
    attacks = parse(attack, norm or "Linf")
    rules = _rules(tolerance, clean_tolerance, at_least)
    if samples is not None and samples < 1:
        raise EdgekitError("at least one sample is needed", where=f"--samples {samples}")
    if not 0 <= seed < 2**31:
        raise EdgekitError("a seed goes from 0 to 2,147,483,647", where=f"--seed {seed}")
    if norm == "L2" and epsilon is None:
        raise EdgekitError("an L2 radius has no default", where="--norm L2", mend="Say --epsilon 0.5, or another")
    radius = None if epsilon is None else _radius(epsilon, norm or "Linf")
    copies = _copies({"--report": report, "--markdown": markdown, "--junit": junit})
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
    if judge is not None:
        assignment = _judged_by(assignment, judge)
    trial = Trial(
        attacks,
        assignment.split.floats(),
        assignment.split.labels,
        assignment.split.index,
        assignment.epsilon,
        seed,
        norm or "Linf",
        grid,
    )
    if assignment.student is not None:
        say(power_sentence(len(trial.labels), rules.tolerance, rules.clean_tolerance))
    notebook = Notebook(assignment.verdicts, _key(assignment, trial, source, judge), fresh=not resume)
    if resume:
        say(f"{notebook.parts} finished parts are taken up" if notebook.parts else "There is nothing to continue.")
    with contextlib.ExitStack() as stack:
        stack.enter_context(_kept(notebook, command if resume else f"{command} --resume"))
        stack.enter_context(_torch_threads(assignment.threads))
        surrogates = {} if source is None else _surrogate(Path(source), assignment)
        archived = stack.enter_context(archive.adversarial(save_adversarial, trial)) if save_adversarial else None
        results = _examine_all(
            assignment, surrogates, trial, rules, notebook, archived, self_test=self_test, curves="--report" in copies
        )
        document = verdict.summarize(
            rules,
            results.artifacts,
            attacks=[one.name for one in attacks],
            norm=trial.norm,
            epsilon=trial.epsilon,
            samples=len(trial.labels),
            seed=seed,
            data=assignment.data,
            machine=verdict.Machine(**judges.machine_block()),
            float_student=results.float_student,
            looks=archive.looks(
                assignment.verdicts, [one.about["sha256"] for one in assignment.entries], assignment.data.sha256
            ),
        )
    evidence = Evidence(
        tuple(results.files),
        assignment.classes or (),
        results.float_curves,
        versions=document.machine.runtimes | {"edgekit": document.edgekit, "torch": torch.__version__},
        facts=assignment.facts,
    )
    document, folder = archive.keep(
        assignment.verdicts, document, results.lines, lambda one: page.to_html(one, evidence, command)
    )
    for option, place in copies.items():
        write_text(place, _WRITERS[option](document, evidence, command))
    notebook.close()
    say(f"Kept in {folder}: verdict.json, report.html")
    return verdict.to_dict(document)


_WRITERS: dict[str, Callable[[Verdict, Evidence, str], str]] = {
    "--report": page.to_html,
    "--markdown": lambda document, evidence, command: to_markdown(document),
    "--junit": lambda document, evidence, command: to_xml(document),
}


def _copies(asked: dict[str, str | Path | None]) -> dict[str, Path]:
    """Where copies of the report go; looked at before anything is attacked."""
    found = {option: Path(place) for option, place in asked.items() if place is not None}
    for option, place in found.items():
        if place.is_dir():
            raise EdgekitError("this is a folder, not a file", where=f"{option} {place}")
        if not place.parent.is_dir():
            raise EdgekitError("its folder is not there", where=f"{option} {place}")
    return found


def _key(assignment: Assignment, trial: Trial, source: str | Path | None, judge: str | None) -> str:
    """A digest of all that a finished part of an attack depends on."""
    images, labels = (part.numpy().tobytes() for part in (assignment.split.images, trial.labels))
    return digest(
        images,
        labels,
        json.dumps(
            {
                "edgekit": __version__,
                "machine": judges.machine_block(),
                "port": None if assignment.port is None else asdict(assignment.port),
                "files": [[entry.about["name"], entry.about["sha256"]] for entry in assignment.entries],
                "facts": assignment.facts,
                "data": assignment.data.sha256,
                "index": trial.index.tolist(),
                "attacks": [[attack.name, attack.restarts] for attack in trial.attacks],
                "ball": [trial.norm, trial.epsilon, trial.grid],
                "seed": trial.seed,
                "threads": assignment.threads,
                "source": None if source is None else _fingerprint(Path(source)),
                "judge": judge,
            },
            sort_keys=True,
        ),
    )


def _fingerprint(source: Path) -> str:
    """A digest of the model of --source, its weights included where they lie beside it."""
    if source.suffix == ".safetensors" and source.is_file():
        return sha256(source)
    return foreign.fingerprint(source, foreign.external(foreign.read(source)))


def _judged_by(assignment: Assignment, address: str) -> Assignment:
    """The same with one file's answers taken from a program or device."""
    if len(assignment.entries) != 1:
        names = ", ".join(entry.about["name"] for entry in assignment.entries)
        mend = "Name the artifact whose file runs there"
        raise EdgekitError(f"one judge answers for one file, not for {names}", where="--judge", mend=mend)
    (entry,) = assignment.entries
    remote = judges.connect(address)

    def subject() -> Subject:
        # One conversation: a device may take no second one, so the replay asks the same judge again.
        return replace(entry.subject(), judged_on=f"judge {address}", open=lambda: remote)

    return replace(assignment, entries=[Entry(entry.about, subject)])


def _of_run(path: Path | None, samples: int | None, seed: int, radius: float | None) -> Assignment:
    """The artifacts of a run, or one of them, on the run's own test images."""
    run, found = _found(path)
    recipe = read(run.recipe_file)
    dataset = _same_data(run, recipe.data)
    split = dataset.test[stratified(dataset.test.labels, samples or SAMPLES, seed)]
    _few(split, samples)
    threads = min(run.info().get("threads", 1), machine.cores())
    # The channels-last layout halves the time of a convolution's two passes on a CPU.
    student = models.load(run.student, factory=recipe.student.architecture).requires_grad_(False)
    student = student.to(memory_format=torch.channels_last)
    return Assignment(
        entries=[Entry(_about(run, one), partial(_subject, run, one, threads)) for one in found],
        split=split,
        data=verdict.Data(dataset.name, SPLIT, dataset.sha256),
        epsilon=recipe.inner.epsilon if radius is None else radius,
        threads=threads,
        verdicts=run.verdicts,
        student=student,
        classes=student.classes,
        facts={"student sha256": sha256(run.student), "recipe sha256": sha256(run.recipe_file)},
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
    opened = partial(judges.open, path, threads=machine.cores(), output=port.output)
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
            judged_on=judges.judged_on("onnx"),
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
        port=port,
    )


def _few(split: Split, samples: int | None) -> None:
    if samples is not None and len(split) < samples:
        say(f"There are {len(split):,} test images; all of them are drawn.")


def _surrogate(path: Path, assignment: Assignment) -> dict[str, Classifier]:
    """The model of --source by its file's name: another network whose gradients the attacks follow too.

    A file called float.onnx must not take the place of the float student, nor twin.onnx that of the twin.
    """
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
    name = path.stem.replace(TOGETHER, "-")
    return {path.name if name in ("float", "twin", SCORES) else name: network}


@dataclass
class _Results:
    """What examining all files gave: verdicts, evidence for the report, and lines of samples.jsonl."""

    float_student: FloatStudent | None = None
    float_curves: Curves = field(default_factory=Curves)
    artifacts: list[ArtifactVerdict] = field(default_factory=list)
    files: list[FileEvidence] = field(default_factory=list)
    lines: list[dict[str, Any]] = field(default_factory=list)


def _examine_all(
    assignment: Assignment,
    surrogates: dict[str, Classifier],
    trial: Trial,
    rules: Rules,
    notebook: Notebook,
    archived: Callable[[str, Examined], None] | None,
    *,
    self_test: bool,
    curves: bool,
) -> _Results:
    """Examine every file, one after the other."""
    results = _Results()
    with progress() as bar:

        def watch(name: str, sources: int) -> Advance:
            tasks: dict[str, Any] = {}

            def advance(attack: Attack, samples: int) -> None:
                if attack.name not in tasks:
                    total = (sources if attack.gradients and not attack.needs else 1) * len(trial.labels)
                    tasks[attack.name] = bar.add_task(f"{printable(name)}, {attack.name}", total=total, note="")
                bar.update(tasks[attack.name], advance=samples)

            return advance

        beside = None
        if (student := assignment.student) is not None:
            sources = {"float": student} | surrogates
            own = trial.run(student, sources, watch("float student", len(sources)), notebook.page("float student"))
            results.float_student = _float_student(own, trial, rules)
            beside = Beside(student, own)
            if curves:
                results.float_curves = sweep(student, student, trial)
            if bar.disable:
                say(f"float student: {_percent(own.robust)} robust under its own gradients")
        for entry in assignment.entries:
            name = entry.about["name"]
            try:
                subject = entry.subject()
            except EdgekitError as error:
                if error.exit_code != ENVIRONMENT:
                    raise
                results.artifacts.append(verdict.not_run(**entry.about, why=str(error)))
                continue
            examined = examine(subject, beside, trial, rules, surrogates, watch, notebook.page, self_test=self_test)
            if bar.disable:
                seconds = sum(examined.outcome.seconds.values())
                checked = f"checks {examined.verdict.checks_seconds or 0:.1f} s"
                say(f"{name}: {_percent(examined.outcome.robust)} robust ({seconds:.1f} s, {checked})")
            if examined.outcome.skipped:
                say(f"{name}: {', '.join(examined.outcome.skipped)} did not run: no source for it")
            results.artifacts.append(examined.verdict)
            seen = _evidence(name, trial, beside, examined)
            source = subject.twin or student or next(iter(surrogates.values()), None)
            if curves and source is not None:
                say(f"{name}: accuracy against epsilon and steps, for the report")
                seen = replace(seen, curves=sweep(examined.judged, source, trial))
            results.files.append(seen)
            results.lines += archive.lines(name, trial, None if beside is None else beside.own, examined)
            if archived:
                archived(name, examined)
    if not results.lines:
        why = results.artifacts[0].why
        raise EdgekitError(f"nothing could run here ({why})", exit_code=ENVIRONMENT)
    return results


def _evidence(name: str, trial: Trial, beside: Beside | None, examined: Examined) -> FileEvidence:
    """What the report shows of one file beside its verdict."""
    outcome = examined.outcome
    attacks, sources = outcome.won()
    student = {}
    if beside is not None:
        student = {
            "float_clean": beside.own.clean.argmax(1) == trial.labels,
            "float_robust": examined.float_robust,
            "float_says": predict(beside.student, outcome.adversarial).argmax(1),
        }
    return gather(
        name,
        images=trial.images,
        labels=trial.labels,
        index=trial.index,
        file_clean=outcome.clean.argmax(1) == trial.labels,
        file_robust=outcome.robust,
        adversarial=outcome.adversarial,
        file_says=examined.answers,
        attacks=attacks,
        sources=sources,
        **student,
    )


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


def _radius(epsilon: float | str, norm: str) -> float:
    try:
        value = typed(epsilon)
    except (ValueError, OverflowError):
        raise EdgekitError("should be a number or a fraction such as 8/255", where=f"--epsilon {epsilon}") from None
    if norm == "Linf" and not 0 < value <= 1:
        mend = "Pixels go from 0 to 1; write 8/255 for eight of 255 levels" if value > 1 else None
        raise EdgekitError("an Linf epsilon is above 0 and at most 1", where=f"--epsilon {epsilon}", mend=mend)
    if not 0 < value < math.inf:
        raise EdgekitError("an epsilon is above 0", where=f"--epsilon {epsilon}")
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
    opener = partial(judges.open, one, threads=threads)
    first = [opener()]  # a missing runtime shows here, before anything is attacked
    opened = lambda: first.pop() if first else opener()  # noqa: E731
    return Subject(**_about(run, one), judged_on=judges.judged_on(one.format), open=opened, twin=copy)


@contextlib.contextmanager
def _kept(notebook: Notebook, command: str) -> Iterator[None]:
    """Finished parts outlive an interruption and a full disk, and not an input that will be refused again."""
    try:
        yield
    except KeyboardInterrupt:
        if command.startswith("edgekit "):
            say(f"Interrupted; {notebook.parts} finished parts are kept. Continue with: {command}")
        raise
    except EdgekitError as error:
        if error.exit_code != ENVIRONMENT:
            notebook.close()
        raise


@contextlib.contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
