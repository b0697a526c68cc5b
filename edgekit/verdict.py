"""The Verdict: what an attack on the exported files showed, and the rules that turn it into one word (CLI.md).

`accuracy` and `compare` make figures from what each sample did, `judged` and `not_run` make the verdict on one file,
`summarize` the whole document. `to_dict` is verdict.json and what `--json` prints; `from_dict` reads it back.
"""

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from edgekit import __version__, statistics
from edgekit.errors import EdgekitError
from edgekit.statistics import CONFIDENCE, points

SCHEMA = 1
EXIT = {"survived": 0, "measured": 0, "lost": 1, "inconclusive": 3, "not_run": 3}
WORST_FIRST = ("lost", "inconclusive", "not_run", "measured", "survived")

T = TypeVar("T")


@dataclass(frozen=True)
class Accuracy:
    """A fraction of all samples drawn, with its Wilson interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Change:
    """Artifact minus float on the same samples, with Tango's interval; p_value is McNemar's, and decides nothing."""

    value: float
    low: float
    high: float
    p_value: float
    only_float: int  # samples that only the float student gets right
    only_artifact: int


@dataclass(frozen=True)
class Changes:
    clean: Change
    robust: Change


@dataclass(frozen=True)
class Since:
    """Artifact minus the earlier release's file on the same samples; as `Change`."""

    value: float
    low: float
    high: float
    p_value: float
    only_baseline: int  # samples that only the earlier file gets right
    only_artifact: int


@dataclass(frozen=True)
class Versus:
    """A file against that of an earlier release; `verdict` is survived, lost or inconclusive, as against the student.

    Attributes:
        name, sha256, edgekit: of the earlier artifact, its file, and the edgekit that judged it.
        robust_accuracy: the earlier file's, on the same samples.
    """

    name: str
    sha256: str
    edgekit: str
    robust_accuracy: Accuracy
    clean: Since
    robust: Since
    verdict: str
    why: str


@dataclass(frozen=True)
class Planned:
    """The look at which a file was decided, of those that were planned before anything was attacked.

    Attributes:
        looks: how many were planned.    look: the one that these figures are of, counted from 1.
        samples, boundaries: of every look that was planned: how many samples there are, and the normal quantile of
            the intervals.
        boundary, confidence: of this look.
        decided: whether its intervals decide; where not, the samples came to their end.
    """

    looks: int
    look: int
    samples: tuple[int, ...]
    boundaries: tuple[float, ...]
    boundary: float
    confidence: float
    decided: bool


@dataclass(frozen=True)
class AttackResult:
    """One attack: accuracy under the worst of its sources for each sample, and under each source alone."""

    name: str
    robust_accuracy: float
    sources: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class Twin:
    """How faithfully the differentiable copy answers: agreement of the decisions, largest difference of the logits."""

    agreement: float
    max_abs_difference: float


@dataclass(frozen=True)
class Check:
    """A test of the attack itself; where it fails, robust accuracy is not to be believed."""

    name: str
    passed: bool
    value: float
    why: str


@dataclass(frozen=True)
class FloatStudent:
    """The float student under its own gradients."""

    clean_accuracy: Accuracy
    robust_accuracy: Accuracy


@dataclass(frozen=True)
class Data:
    name: str
    split: str
    sha256: str


@dataclass(frozen=True)
class Machine:
    cpu: str
    int8_instructions: str
    runtimes: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Place:
    """What one processor's own kernels made of a file.

    Attributes:
        agreement, max_abs_difference: of its decisions and scores with those of `native`, on all `images` that both
            were shown: the clean ones, each iterate of the attacks in `every_iterate_of`, and the images that fooled
            `native` or came nearest to it.
    """

    processor: str
    runtime: str
    clean_accuracy: Accuracy | None = None
    robust_accuracy: Accuracy | None = None
    agreement: float | None = None
    max_abs_difference: float | None = None
    images: int | None = None
    every_iterate_of: tuple[str, ...] = ()
    verdict: str
    why: str


@dataclass(frozen=True, kw_only=True)
class ArtifactVerdict:
    """The verdict on one exported file; what does not apply to it is None, and absent from the JSON."""

    name: str
    format: str
    precision: str
    file: str  # relative to the run
    bytes: int
    sha256: str
    clean_accuracy: Accuracy | None = None
    robust_accuracy: Accuracy | None = None
    float_robust_accuracy: Accuracy | None = None
    attacks: tuple[AttackResult, ...] = ()
    change: Changes | None = None
    baseline: Versus | None = None
    plan: Planned | None = None
    agreement: float | None = None
    twin: Twin | None = None
    checks: tuple[Check, ...] = ()
    checks_seconds: float | None = None  # what the checks took, beside the attacks' own seconds
    within_one_quantum: float | None = None  # share of samples whose two best clean scores lie so near, of int8 files
    saturating_pairs: int | None = None  # of weights, whose products some x86 processors cannot sum in 16 bits
    judged_on: str | tuple[Place, ...] | None = None
    code_ran: bool | None = None  # the file is a program (TorchScript), and it ran on its user's word
    verdict: str
    why: str
    command: str | None = None  # of a file that cannot run here: what judges it on its device

    @property
    def places(self) -> tuple[str, ...]:
        """The processors and arithmetics that it was judged under, where there is more than one."""
        return tuple(place.processor for place in self.judged_on) if isinstance(self.judged_on, tuple) else ()


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The document of `verify --json`, field by field."""

    schema: int = SCHEMA
    edgekit: str = __version__
    verdict: str
    passed: bool
    attacks: tuple[str, ...]
    norm: str
    epsilon: float
    samples: int
    seed: int
    tolerance: float
    clean_tolerance: float
    at_least: float | None = None
    confidence: float
    looks: int = 1
    data: Data
    machine: Machine
    float: FloatStudent | None = None
    artifacts: tuple[ArtifactVerdict, ...]
    report: str | None = None
    grid: bool = False  # whether only images of uint8 values counted as adversarial

    def drawn(self, one: ArtifactVerdict) -> int:
        """How many samples the figures of one of the artifacts rest on."""
        return self.samples if one.plan is None else one.plan.samples[one.plan.look - 1]

    @property
    def exit_code(self) -> int:
        return 0 if self.passed else EXIT[self.verdict]


@dataclass(frozen=True)
class Rules:
    """What was asked for before anything was measured; all fractions.

    `at_least` is the robust accuracy that a file must reach, None where nothing was asked.
    """

    tolerance: float = 0.02
    clean_tolerance: float = 0.02
    at_least: float | None = None
    confidence: float = CONFIDENCE


def accuracy(right: Sequence[bool] | Any, confidence: float = CONFIDENCE) -> Accuracy:
    """The share of samples answered rightly; `right` (N,) bool, any array or sequence.

    Raises:
        EdgekitError: there are no samples.
    """
    answers = _booleans(right)
    count = int(answers.sum())
    return Accuracy(count / len(answers), *statistics.wilson(count, len(answers), confidence))


def compare(
    float_right: Sequence[bool] | Any, artifact_right: Sequence[bool] | Any, confidence: float = CONFIDENCE
) -> Change:
    """The paired change, artifact minus float; both (N,) bool over the same samples in the same order.

    Raises:
        EdgekitError: the two lengths differ, or there are no samples.
    """
    float_answers, answers = _booleans(float_right), _booleans(artifact_right)
    if len(float_answers) != len(answers):
        raise EdgekitError(f"{len(float_answers)} answers cannot be paired with {len(answers)}")
    only_float, only_artifact = int((float_answers & ~answers).sum()), int((~float_answers & answers).sum())
    low, high = statistics.tango(only_float, only_artifact, len(answers), confidence)
    p_value = statistics.mcnemar(only_float, only_artifact)
    return Change((only_artifact - only_float) / len(answers), low, high, p_value, only_float, only_artifact)


def versus(
    rules: Rules,
    earlier: tuple[Sequence[bool] | Any, Sequence[bool] | Any],
    now: tuple[Sequence[bool] | Any, Sequence[bool] | Any],
    *,
    name: str,
    sha256: str,
    edgekit: str,
    doubt: str | None = None,
) -> Versus:
    """Hold a file against that of an earlier release, by the rules that hold against the float student.

    Args:
        earlier, now: right when clean, and robust, each (N,) bool over the same samples in the same order.
        name, sha256, edgekit: as Versus explains them.
        doubt: why nothing is decided of the robust accuracy, where that is known.
    """
    (clean_before, robust_before), (clean, robust) = map(_both, (earlier, now))
    confidence = rules.confidence
    change = Changes(compare(clean_before, clean, confidence), compare(robust_before, robust, confidence))
    before = accuracy(robust_before, confidence)
    verdict, why = _against(rules, change, len(robust), "against the baseline, ")
    if before.low <= rules.tolerance:
        doubt = f"the baseline has no robustness to lose: {_percent(before)}"
    if doubt and not change.clean.high < -rules.clean_tolerance:
        verdict, why = "inconclusive", f"{why}; {doubt}"
    clean_since, robust_since = (Since(*dataclasses.astuple(one)) for one in (change.clean, change.robust))
    return Versus(name, sha256, edgekit, before, clean_since, robust_since, verdict, why)


def _both(answers: tuple[Any, Any]) -> tuple[Any, Any]:
    """What is wrong when clean is not robust, whatever the attack says."""
    clean = _booleans(answers[0])
    return clean, clean & _booleans(answers[1])


def _booleans(right: Any) -> Any:
    import numpy as np

    answers = np.asarray(right, dtype=bool)
    if answers.ndim != 1 or not len(answers):
        raise EdgekitError("there are no samples to judge")
    return answers


def decide(
    rules: Rules,
    robust_accuracy: Accuracy,
    *,
    float_robust_accuracy: Accuracy | None = None,
    change: Changes | None = None,
    samples: int,
    checks: Iterable[Check] = (),
    undecidable: str | None = None,
    baseline: Versus | None = None,
) -> tuple[str, str]:
    """The verdict on one file and the sentence that says why.

    Args:
        float_robust_accuracy, change: against the float student; both None for a file that has none beside it.
        baseline: against an earlier release: what is lost there is lost; that it is not shown to be as good as the
            earlier one counts only where there is nothing else to hold it against.
        undecidable: why this data cannot decide, where the caller knows that it cannot.
    """
    findings: list[tuple[str, str]] = []
    if change is not None:
        findings.append(_against(rules, change, samples))
    if rules.at_least is not None:
        findings.append(_against_floor(rules.at_least, robust_accuracy))
    if baseline is not None and (baseline.verdict == "lost" or not findings):
        findings.append((baseline.verdict, baseline.why))
    if not findings:
        robust = (
            f"robust accuracy is {_percent(robust_accuracy)}; no float student and no --at-least to hold it against"
        )
        findings.append(("measured", robust))
    verdict = worst(name for name, _ in findings)
    why = "; ".join(sentence for name, sentence in findings if name == verdict)
    doubts = [f"the check {check.name} failed ({check.why})" for check in checks if not check.passed]
    if undecidable:
        doubts.append(undecidable)
    if float_robust_accuracy is not None and float_robust_accuracy.low <= rules.tolerance:
        doubts.append(
            f"the float student has no robustness to lose: {_percent(float_robust_accuracy)}, "
            f"whose low end is not above the {points(rules.tolerance)} allowed"
        )
    # A loss of clean accuracy was found without any attack: no doubt about the attack takes it back.
    compared = [one.clean for one in (change, baseline) if one is not None]
    clean_lost = any(clean.high < -rules.clean_tolerance for clean in compared)
    if doubts and not clean_lost:
        return "inconclusive", "; ".join(doubts)
    return verdict, "; ".join([why, *doubts])


def _against(rules: Rules, change: Changes, samples: int, against: str = "") -> tuple[str, str]:
    """By the paired change alone; `against` begins each sentence."""
    compared = (("robust", change.robust, rules.tolerance), ("clean", change.clean, rules.clean_tolerance))
    said = {kind: f"{against}{_said(kind, one)}" for kind, one, _ in compared}
    lost = [
        f"{said[kind]}: all of the interval is beyond {_allowed(tolerance)}"
        for kind, one, tolerance in compared
        if one.high < -tolerance
    ]
    if lost:
        return "lost", "; ".join(lost)
    open_ends = [
        f"{said[kind]}: the interval holds losses within {_allowed(tolerance)} and beyond"
        for kind, one, tolerance in compared
        if one.low < -tolerance
    ]
    if open_ends:
        strictest = min(rules.tolerance, rules.clean_tolerance)
        if samples < statistics.fewest(strictest, rules.confidence):
            within = f"within {points(strictest)} of a file that changes no answer"
            open_ends.append(f"{samples:,} samples are too few to say 'survived' {within}")
        return "inconclusive", "; ".join(open_ends)
    return "survived", "; ".join(f"{said[kind]}, within {_allowed(tolerance)}" for kind, _, tolerance in compared)


def _against_floor(at_least: float, robust: Accuracy) -> tuple[str, str]:
    said, asked = f"robust accuracy is {_percent(robust)}", f"the {100 * at_least:.4g} % asked for"
    if robust.low >= at_least:
        return "survived", f"{said}: its low end reaches {asked}"
    if robust.high < at_least:
        return "lost", f"{said}: its high end stays below {asked}"
    return "inconclusive", f"{said}: the interval reaches below {asked} and above"


def _said(kind: str, change: Change) -> str:
    ends = f"{100 * change.low:+.1f} to {100 * change.high:+.1f}"
    return f"{kind} accuracy changed by {100 * change.value:+.1f} points ({ends})"


def _allowed(tolerance: float) -> str:
    return f"the {points(tolerance)} allowed"


def _percent(share: Accuracy) -> str:
    return f"{100 * share.value:.1f} % ({100 * share.low:.1f} to {100 * share.high:.1f})"


def judged(
    rules: Rules,
    clean_right: Sequence[bool] | Any,
    robust_right: Sequence[bool] | Any,
    *,
    name: str,
    format: str,
    precision: str,
    file: str,
    bytes: int,
    sha256: str,
    attacks: Iterable[AttackResult],
    judged_on: str,
    float_clean_right: Sequence[bool] | Any | None = None,
    float_robust_right: Sequence[bool] | Any | None = None,
    agreement: float | None = None,
    twin: Twin | None = None,
    checks: Iterable[Check] = (),
    checks_seconds: float | None = None,
    undecidable: str | None = None,
    baseline: Versus | None = None,
    planned: Planned | None = None,
) -> ArtifactVerdict:
    """The verdict on one file from what each sample did; every array (N,) bool over the same samples.

    Args:
        clean_right, robust_right: the file's answer is right on the clean image; right under every attack and source.
        float_clean_right, float_robust_right: the same of the float student, under every (attack, source, seed,
            restart) that the file faced; both None for a file that has no student beside it.
        planned: the look that this is; `rules.confidence` is then that look's.
    A sample that is wrong when clean counts as not robust, whatever the attack says.
    """
    clean = _booleans(clean_right)
    robust = clean & _booleans(robust_right)
    float_accuracy = change = None
    if float_clean_right is not None and float_robust_right is not None:
        float_clean = _booleans(float_clean_right)
        float_robust = float_clean & _booleans(float_robust_right)
        float_accuracy = accuracy(float_robust, rules.confidence)
        change = Changes(compare(float_clean, clean, rules.confidence), compare(float_robust, robust, rules.confidence))
    robust_accuracy, checks = accuracy(robust, rules.confidence), tuple(checks)
    verdict, why = decide(
        rules,
        robust_accuracy,
        float_robust_accuracy=float_accuracy,
        change=change,
        samples=len(clean),
        checks=checks,
        undecidable=undecidable,
        baseline=baseline,
    )
    return ArtifactVerdict(
        name=name,
        format=format,
        precision=precision,
        file=file,
        bytes=bytes,
        sha256=sha256,
        clean_accuracy=accuracy(clean, rules.confidence),
        robust_accuracy=robust_accuracy,
        float_robust_accuracy=float_accuracy,
        attacks=tuple(attacks),
        change=change,
        baseline=baseline,
        plan=planned,
        agreement=agreement,
        twin=twin,
        checks=checks,
        checks_seconds=checks_seconds,
        judged_on=judged_on,
        verdict=verdict,
        why=why,
    )


def not_run(
    *,
    name: str,
    format: str,
    precision: str,
    file: str,
    bytes: int,
    sha256: str,
    why: str,
    command: str | None = None,
) -> ArtifactVerdict:
    """The verdict on a file that cannot run here: the reason, and the command that judges it where it can."""
    return ArtifactVerdict(
        name=name,
        format=format,
        precision=precision,
        file=file,
        bytes=bytes,
        sha256=sha256,
        verdict="not_run",
        why=why,
        command=command,
    )


def worst(verdicts: Iterable[str]) -> str:
    """The worst of some verdicts: lost, inconclusive, not_run, measured, survived.

    Raises:
        EdgekitError: there are none, or one is no verdict.
    """
    found = set(verdicts)
    if not found or not found <= set(WORST_FIRST):
        raise EdgekitError(f"no verdict can be taken from {sorted(found)}")
    return next(name for name in WORST_FIRST if name in found)


def summarize(
    rules: Rules,
    artifacts: Sequence[ArtifactVerdict],
    *,
    attacks: Iterable[str],
    norm: str,
    epsilon: float,
    samples: int,
    seed: int,
    data: Data,
    machine: Machine,
    float_student: FloatStudent | None = None,
    looks: int = 1,
    grid: bool = False,
    report: str | None = None,
    skip_unavailable: bool = False,
) -> Verdict:
    """The whole document: the run's verdict is the worst of its artifacts'.

    Args:
        skip_unavailable: files that could not run do not make the run fail, as long as one did run.
    """
    counted = [one.verdict for one in artifacts if not (skip_unavailable and one.verdict == "not_run")]
    return Verdict(
        verdict=worst(one.verdict for one in artifacts),
        passed=bool(counted) and EXIT[worst(counted)] == 0,
        attacks=tuple(attacks),
        norm=norm,
        epsilon=epsilon,
        grid=grid,
        samples=samples,
        seed=seed,
        tolerance=rules.tolerance,
        clean_tolerance=rules.clean_tolerance,
        at_least=rules.at_least,
        confidence=rules.confidence,
        looks=looks,
        data=data,
        machine=machine,
        float=float_student,
        artifacts=tuple(artifacts),
        report=report,
    )


def to_dict(value: Any) -> Any:
    """A Verdict, or any part of it, as plain JSON values: same names, same order, what is None left out."""
    if dataclasses.is_dataclass(value):
        pairs = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {name: to_dict(item) for name, item in pairs if item is not None}
    if isinstance(value, Mapping):
        return {name: to_dict(item) for name, item in value.items()}
    return [to_dict(item) for item in value] if isinstance(value, tuple) else value


def from_dict(document: Any, *, where: object = None) -> Verdict:
    """Read what `to_dict` wrote; fields that a later edgekit added are passed over.

    Raises:
        EdgekitError: it is no verdict.json of this schema.
    """
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise EdgekitError(f"not a verdict.json of schema {SCHEMA}", where=where)
    try:
        verdict = read_as(Verdict, document, "")
    except ValueError as error:
        raise EdgekitError(f"not a valid verdict.json: {error}", where=where) from None
    places = [place for one in verdict.artifacts if isinstance(one.judged_on, tuple) for place in one.judged_on]
    for one in (verdict, *verdict.artifacts, *places):
        if one.verdict not in EXIT:
            raise EdgekitError(f"not a valid verdict.json: there is no verdict '{one.verdict}'", where=where)
    return verdict


def read_as(kind: Any, value: Any, place: str = "") -> Any:
    """What `to_dict` made of a dataclass of these types, as one again; ValueError names the place that does not fit."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:  # X | None, and None is never written; X | tuple[Y, ...] where a list is one
        several = [one for one in arguments if typing.get_origin(one) is tuple]
        return read_as(several[0] if several and isinstance(value, list) else arguments[0], value, place)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints = typing.get_type_hints(kind)
        fields = [field for field in dataclasses.fields(kind) if field.name in value]
        required = (field for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING)
        if missing := [field.name for field in required if field.name not in value]:
            raise ValueError(f"{place or 'it'} has no {missing[0]}")
        read = {field.name: read_as(hints[field.name], value[field.name], f"{place}.{field.name}") for field in fields}
        return typing.cast(Any, kind)(**read)
    if origin is tuple and isinstance(value, list):
        return tuple(read_as(arguments[0], item, f"{place}[{number}]") for number, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {name: read_as(arguments[1], item, f"{place}.{name}") for name, item in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and type(value) is kind:
        return value
    raise ValueError(f"{place.lstrip('.')} is not what it should be")
