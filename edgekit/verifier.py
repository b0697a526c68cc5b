"""Attacks x artifacts -> Verdict: every file of a run is attacked in its own runtime, beside the float student.

`verify` is the command. What is judged stands in assignment.py, what happens to one file in examine.py, and what is
kept of it in archive.py.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgekit import __version__, archive, foreign, verdict
from edgekit import judge as judges
from edgekit.archive import Notebook
from edgekit.assignment import Assignment, assign, surrogate
from edgekit.attacks import Attack, parse
from edgekit.attacks.campaign import Outcome
from edgekit.checks import share
from edgekit.classifier import Classifier, predict
from edgekit.console import progress, say
from edgekit.errors import ENVIRONMENT, EdgekitError, printable
from edgekit.examine import Advance, Beside, Examined, Trial, examine
from edgekit.files import digest, sha256, write_text
from edgekit.foreign import Said
from edgekit.recipe import typed
from edgekit.report import page
from edgekit.report.evidence import Curves, Evidence, FileEvidence, gather
from edgekit.report.junit import to_xml
from edgekit.report.markdown import to_markdown
from edgekit.statistics import power_sentence
from edgekit.sweep import sweep
from edgekit.verdict import ArtifactVerdict, FloatStudent, Rules, Verdict


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
    assignment = assign(what, None if data is None else Path(data), said, samples, seed, radius, judge)
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
        surrogates = {} if source is None else surrogate(Path(source), assignment)
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
    shown = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    say(f"Kept in {shown}: verdict.json, report.html")
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
    """Examine every file, one after the other; what ends one of them ends all only where it ends each of them.

    Raises:
        EdgekitError: no file could be judged: the first fault in a file, else (exit code 4) what is missing here.
    """
    results, faults = _Results(), list[EdgekitError]()
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
                examined = examine(subject, beside, trial, rules, surrogates, watch, notebook.page, self_test=self_test)
            except EdgekitError as error:
                # What the other files went through for minutes is not thrown away for this one.
                faults.append(error)
                say(f"{name} is not judged: {error}")
                results.artifacts.append(verdict.not_run(**entry.about, why=str(error)))
                continue
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
        raise next((one for one in faults if one.exit_code != ENVIRONMENT), None) or EdgekitError(
            f"nothing could run here ({faults[0]})", exit_code=ENVIRONMENT
        )
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


@contextlib.contextmanager
def _kept(notebook: Notebook, command: str) -> Iterator[None]:
    """Finished parts outlive an interruption and a full disk, and not an input that will be refused again."""
    try:
        yield
    except KeyboardInterrupt:
        if command.startswith("edgekit "):
            say(f"Interrupted; {notebook.parts} finished parts are kept. Continue with: {command}")
        notebook.leave()
        raise
    except EdgekitError as error:
        if error.exit_code != ENVIRONMENT:
            notebook.close()
        notebook.leave()
        raise
    except BaseException:
        notebook.leave()
        raise


@contextlib.contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
