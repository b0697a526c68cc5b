"""Attacks x artifacts -> Verdict: every file of a run is attacked in its own runtime, beside the float student.

`verify` is the command. What is judged stands in assignment.py, what happens to one file in examine.py, and what is
kept of it in archive.py.
"""

import contextlib
import json
import math
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgekit import __version__, archive, crew, foreign, looks, planned, processors, verdict
from edgekit import baseline as earlier
from edgekit import judge as judges
from edgekit.archive import Notebook
from edgekit.assignment import EVERY, Assignment, Entry, assign, surrogate
from edgekit.attacks import Attack, parse
from edgekit.attacks.campaign import Outcome
from edgekit.checks import share
from edgekit.classifier import Classifier, predict
from edgekit.console import progress, say
from edgekit.elsewhere import everywhere
from edgekit.errors import ENVIRONMENT, EdgekitError, printable
from edgekit.examine import Advance, Beside, Earlier, Examined, Trial, Watch, examine
from edgekit.files import digest, sha256, write_text
from edgekit.foreign import Said
from edgekit.formats import lacking
from edgekit.looks import Looks
from edgekit.planned import Plan
from edgekit.recipe import typed
from edgekit.report import page
from edgekit.report.evidence import Curves, Evidence, FileEvidence, gather
from edgekit.report.junit import to_xml
from edgekit.report.markdown import to_markdown
from edgekit.statistics import power_sentence
from edgekit.sweep import sweep
from edgekit.verdict import ArtifactVerdict, FloatStudent, Rules, Verdict


@crew.together
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
    until_decided: bool = False,
    baseline: str | Path | None = None,
    save_adversarial: str | Path | None = None,
    report: str | Path | None = None,
    markdown: str | Path | None = None,
    junit: str | Path | None = None,
    judge: str | None = None,
    on: str | None = None,
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
    trust_file: bool = False,
    skip_unavailable: bool = False,
) -> dict[str, Any]:
    """Attack exported files in their own runtimes and say whether the robustness of their student survived in them.

    Args:
        what: a run folder, one artifact folder of a run, or an ONNX or TorchScript file; every artifact of the
            latest run by default.
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
        until_decided: draw further samples, up to `samples` or all, until every file is decided: at most five looks
            that are planned beforehand, with intervals that allow for them (planned.py).
        baseline: verdict.json of an earlier release: each file is also compared with that release's, sample by sample.
        save_adversarial: an .npz file for the adversarial images (CLI.md).
        report: a copy of the HTML report; it then also holds accuracy against epsilon and steps, which takes a while.
        markdown, junit: the verdict for a pull request, and as JUnit XML for CI.
        judge: "tcp://HOST:PORT" or a command line: the program or device that answers in the place of one file.
        on: "native,x86-avx2,arm64": the processors that each file is judged on, emulated; they must be set up.
        command: what was typed, for the report.
        data: FOLDER/CLASS/* or FOLDER/test/CLASS/*: the photos for a file that belongs to no run.
        source: a model whose gradients are followed as well: student.safetensors, or an ONNX file.
        mean, std, layout, channels, output, classes, resize, size, trust_file: what a file of no run does not say of
            itself, as foreign.Said explains.
        skip_unavailable: a file that cannot run here does not make the verdict fail, as long as another one ran.
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
    places = _places(on, judge)
    torch.set_flush_denormal(True)
    said = Said(
        mean, std, layout, channels, output, None if classes is None else Path(classes), resize, size, trust_file
    )
    before = None if baseline is None else earlier.read(baseline)
    most = EVERY if until_decided and samples is None else samples
    assignment = assign(what, None if data is None else Path(data), said, most, seed, radius, judge, places)
    plan = None
    if until_decided:
        if on:
            raise EdgekitError(
                "looks at growing samples are planned for one processor", where="--on", mend="Leave out --until-decided"
            )
        if assignment.student is None and at_least is None and before is None:
            raise EdgekitError(
                "there is nothing to decide: no float student lies beside this file",
                where="--until-decided",
                mend="Say --at-least P, or --baseline verdict.json",
            )
        plan = planned.plan(len(assignment.split))
        order = looks.ordered(assignment.split.labels, assignment.split.index, seed)
        assignment = replace(assignment, split=assignment.split[order])
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
    names = [entry.about["name"] for entry in assignment.entries]
    compared = (
        earlier.held_against(before, names, trial, assignment.data, places or (), some=until_decided) if before else {}
    )
    if plan is not None:
        say(_announced(plan))
    if assignment.student is not None:
        last = rules.confidence if plan is None else plan.confidence(plan.looks)
        say(power_sentence(len(trial.labels), rules.tolerance, rules.clean_tolerance, confidence=last))
    among = crew.current()
    for option, given in (("--judge", judge), ("--until-decided", plan)):
        if given is not None and among.size > 1:
            raise EdgekitError(f"is for one process, and {among.size} were started", where=option)
    key = _key(assignment, trial, source, judge, plan)
    notebook = (
        Notebook.joined(among.told("notebook"))
        if among.helper
        else Notebook(assignment.verdicts, key, fresh=not resume)
    )
    among.announce("notebook", str(notebook.folder))
    if resume:
        say(f"{notebook.parts} finished parts are taken up" if notebook.parts else "There is nothing to continue.")
    with contextlib.ExitStack() as stack:
        stack.enter_context(_kept(notebook, command if resume else f"{command} --resume"))
        stack.enter_context(_torch_threads(assignment.threads))
        surrogates = {} if source is None else surrogate(Path(source), assignment)
        saving = save_adversarial if not among.helper else None
        archived = stack.enter_context(archive.adversarial(saving)) if saving else None
        results = _examine_all(
            assignment,
            surrogates,
            trial,
            rules,
            notebook,
            archived,
            self_test=self_test,
            curves="--report" in copies and not among.helper,
            compared=compared,
            plan=plan,
        )
        document = verdict.summarize(
            rules,
            results.artifacts,
            attacks=[one.name for one in attacks],
            norm=trial.norm,
            grid=trial.grid,
            epsilon=trial.epsilon,
            samples=results.samples,
            seed=seed,
            data=assignment.data,
            machine=verdict.Machine(**judges.machine_block()),
            float_student=results.float_student,
            looks=archive.looks(
                assignment.verdicts, [one.about["sha256"] for one in assignment.entries], assignment.data.sha256
            ),
            skip_unavailable=skip_unavailable,
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


def _places(on: str | None, judge: str | None) -> tuple[str, ...] | None:
    """The processors of --on; None where it was not said."""
    if on is None:
        return None
    if judge is not None:
        raise EdgekitError(
            "with --judge it is not this machine that answers", where="--on", mend="Leave one of them out"
        )
    named = processors.parse(on)
    processors.require(named)
    return named


def _copies(asked: dict[str, str | Path | None]) -> dict[str, Path]:
    """Where copies of the report go; looked at before anything is attacked."""
    found = {option: Path(place) for option, place in asked.items() if place is not None}
    for option, place in found.items():
        if place.is_dir():
            raise EdgekitError("this is a folder, not a file", where=f"{option} {place}")
        if not place.parent.is_dir():
            raise EdgekitError("its folder is not there", where=f"{option} {place}")
    return found


def _announced(plan: Plan) -> str:
    """The plan, said before anything is attacked."""
    counts = ", ".join(f"{count:,}" for count in plan.samples)
    quantiles = ", ".join(f"{boundary:.2f}" for boundary in plan.boundaries)
    return (
        f"Up to {plan.looks} looks, at {counts} samples, with intervals of {quantiles} standard errors "
        "(O'Brien-Fleming): together they err as seldom as one look."
    )


def _key(assignment: Assignment, trial: Trial, source: str | Path | None, judge: str | None, plan: Plan | None) -> str:
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
                "looks": None if plan is None else plan.samples,
                "on": assignment.processors,
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

    samples: int = 0  # of the file that needed most
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
    archived: Callable[[str, Trial, Examined], None] | None,
    *,
    self_test: bool,
    curves: bool,
    compared: Mapping[str, Earlier],
    plan: Plan | None,
) -> _Results:
    """Examine every file, one after the other; what ends one of them ends all only where it ends each of them.

    Raises:
        EdgekitError: no file could be judged: the first fault in a file, else (exit code 4) what is missing here.
    """
    results, faults = _Results(), list[EdgekitError]()
    with progress() as bar:

        def watching(samples: int) -> Watch:
            def watch(name: str, sources: int) -> Advance:
                tasks: dict[str, Any] = {}

                def advance(attack: Attack, done: int) -> None:
                    if attack.name not in tasks:
                        total = (sources if attack.gradients and not attack.needs else 1) * samples
                        tasks[attack.name] = bar.add_task(f"{printable(name)}, {attack.name}", total=total, note="")
                    bar.update(tasks[attack.name], advance=done)

                return advance

            return watch

        student, watch = assignment.student, watching(len(trial.labels))
        beside, planned_looks = None, None
        if plan is not None:
            planned_looks = Looks(plan, trial, student, surrogates, watching, notebook.page)
        elif student is not None:
            sources = {"float": student} | surrogates
            own = trial.run(student, sources, watch("float student", len(sources)), notebook.page("float student"))
            results.float_student = _float_student(own, trial, rules)
            beside = Beside(student, own)
            if bar.disable:
                say(f"float student: {_percent(own.robust)} robust under its own gradients")
        if student is not None and curves:
            results.float_curves = sweep(student, student, trial)
        for entry in assignment.entries:
            name = entry.about["name"]
            seen_trial, own = trial, None if beside is None else beside.own
            checked = {"self_test": self_test, "earlier": compared.get(name)}
            try:
                subject = entry.subject()
                if planned_looks is None:
                    examined = examine(subject, beside, trial, rules, surrogates, watch, notebook.page, **checked)
                else:
                    examined, faced = looks.until_decided(subject, planned_looks, rules, **checked)
                    seen_trial, own = faced.trial, faced.own
                near = Beside(student, own) if student is not None and own is not None else None
                look = examined.verdict.plan
                at = rules if look is None else replace(rules, confidence=look.confidence)
                examined = everywhere(examined, subject, near, seen_trial, at, surrogates, watch, notebook.page)
            except crew.Released:
                continue
            except EdgekitError as error:
                # What the other files went through for minutes is not thrown away for this one.
                faults.append(error)
                say(f"{name} is not judged: {error}")
                results.artifacts.append(
                    verdict.not_run(**entry.about, why=str(error), command=_elsewhere(assignment, entry))
                )
                continue
            results.samples = max(results.samples, len(seen_trial.labels))
            if bar.disable:
                seconds = sum(examined.outcome.seconds.values())
                spent = f"checks {examined.verdict.checks_seconds or 0:.1f} s"
                say(f"{name}: {_percent(examined.outcome.robust)} robust ({seconds:.1f} s, {spent})")
            if examined.outcome.skipped:
                say(f"{name}: {', '.join(examined.outcome.skipped)} did not run: no source for it")
            results.artifacts.append(examined.verdict)
            seen = _evidence(name, seen_trial, Beside(student, own) if student and own else None, examined)
            source = subject.twin or student or next(iter(surrogates.values()), None)
            if curves and source is not None:
                say(f"{name}: accuracy against epsilon and steps, for the report")
                seen = replace(seen, curves=sweep(examined.judged, source, seen_trial))
            results.files.append(seen)
            results.lines += archive.lines(name, seen_trial, own, examined)
            if archived:
                archived(name, seen_trial, examined)
        crew.current().release()
        if planned_looks is not None:
            results.float_student = planned_looks.float_student()
    if not results.lines:
        raise next((one for one in faults if one.exit_code != ENVIRONMENT), None) or EdgekitError(
            f"nothing could run here ({faults[0]})", exit_code=ENVIRONMENT
        )
    return results


def _elsewhere(assignment: Assignment, entry: Entry) -> str | None:
    """The command that judges a file on the device that runs it; None where it was no device that lacked."""
    if lacking(entry.about["format"]) is None or assignment.student is None:
        return None
    folder = assignment.verdicts.parent / "artifacts" / entry.about["name"]
    return shlex.join(["edgekit", "verify", str(folder), "--judge", "tcp://HOST:PORT"])


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
