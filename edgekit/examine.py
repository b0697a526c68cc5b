"""One file under attack beside the float student: what both went through, and the verdict on the file.

It knows Classifiers only: no runs, no formats, no terminal.
"""

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from edgekit import checks, crew, verdict
from edgekit.attacks import Attack
from edgekit.attacks.campaign import CHUNK, SCORES, Memory, Outcome, confront, followed
from edgekit.checks import alike, share
from edgekit.classifier import Classifier, Wrapped, predict
from edgekit.errors import EdgekitError
from edgekit.verdict import ArtifactVerdict, AttackResult, Check, Planned, Rules, Versus

# (N,) places in the data, right when clean, robust; the pairs (attack, source) -> against an earlier release.
Earlier = Callable[[Tensor, Tensor, Tensor, Collection[tuple[str, str]], Rules], Versus]

Advance = Callable[[Attack, int], None]
Watch = Callable[[str, int], Advance]


@dataclass(frozen=True)
class Trial:
    """What every judge faces: attacks on (N, C, H, W) float32 images in [0, 1] with (N,) labels and (N,) places."""

    attacks: tuple[Attack, ...]
    images: Tensor
    labels: Tensor
    index: Tensor
    epsilon: float
    seed: int = 0
    norm: str = "Linf"
    grid: bool = False

    def __getitem__(self, chosen: slice) -> "Trial":
        return replace(self, images=self.images[chosen], labels=self.labels[chosen], index=self.index[chosen])

    def run(
        self,
        judge: Classifier,
        sources: Mapping[str, Classifier],
        advance: Advance = lambda *_: None,
        memory: Memory | None = None,
        *,
        shared: bool = True,
    ) -> Outcome:
        """What `judge` goes through; `shared` among the processes that a launcher started, where it started several."""
        return confront(
            judge,
            sources,
            self.attacks,
            self.images,
            self.labels,
            self.index,
            seed=self.seed,
            epsilon=self.epsilon,
            grid=self.grid,
            memory=crew.current().share(memory) if shared else memory,
            advance=advance,
        )


@dataclass(frozen=True)
class Other:
    """Another processor, or another arithmetic, that the same file is judged on as well.

    `open` is None where nothing here runs the file so; `why` says why not.
    """

    processor: str
    runtime: str
    open: Callable[[], Classifier] | None
    why: str = ""


@dataclass(frozen=True)
class Subject:
    """A file under attack: what the verdict says of it, how it is opened, and its differentiable copy if it has one."""

    name: str
    format: str
    precision: str
    file: str
    bytes: int
    sha256: str
    judged_on: str
    open: Callable[[], Classifier]
    twin: Classifier | None = None
    called: str = "twin"  # what the gradients of `twin` are called among the sources
    code_ran: bool | None = None  # the file is a program, and it ran
    note: str | None = None  # what the verdict's sentence says besides
    chance: float | None = None  # accuracy by guessing, which nothing can be decided about
    others: tuple[Other, ...] = ()  # where it is judged beside `native`: elsewhere.py
    quantum: float | None = None  # the step of an int8 file's scores
    saturating_pairs: int | None = None  # of an int8 file's weights

    def about(self) -> dict[str, Any]:
        """The fields that a verdict repeats."""
        return {key: getattr(self, key) for key in ("name", "format", "precision", "file", "bytes", "sha256")}


@dataclass(frozen=True)
class Examined:
    """One file's verdict, and what it and the float student did on each sample."""

    verdict: ArtifactVerdict
    outcome: Outcome
    answers: Tensor  # (N,) int64, what a freshly opened file says of the adversarial images
    judged: Classifier  # the file as it was attacked, still open
    float_robust: Tensor | None  # (N,) bool, under all that the file faced; None where no student stands beside it


@dataclass(frozen=True)
class Beside:
    """The float student, and what it went through under its own gradients, as `trial.run` gives it."""

    student: Classifier
    own: Outcome


@dataclass(frozen=True)
class Opened:
    """A file ready to be attacked.

    Attributes:
        judged: its own answers.    sources: whose gradients are followed, by name.
        probe: images that tell whether its answers depend on the batch; the same for every opening.
    """

    subject: Subject
    judged: Classifier
    sources: dict[str, Classifier]
    probe: Tensor

    @cached_property
    def again(self) -> Classifier:
        """The file opened once more, which is shown nothing but what fooled it: the replay."""
        return one_by_one_where_needed(self.subject.open(), self.probe)


@dataclass(frozen=True)
class Faced:
    """What a file and its student went through on the samples of `trial`, each replay taken into account.

    Attributes:
        replayed: (N, K), what a freshly opened file answers to the adversarial images; `repeats` is that check.
        own: the student under its own gradients; float_robust (N,) bool: under all that the file faced.
    """

    trial: Trial
    outcome: Outcome
    replayed: Tensor
    repeats: Check
    own: Outcome | None
    float_robust: Tensor | None

    @cached_property
    def clean_right(self) -> Tensor:
        return self.outcome.clean.argmax(1) == self.trial.labels

    @cached_property
    def float_clean_right(self) -> Tensor | None:
        return None if self.own is None else self.own.clean.argmax(1) == self.trial.labels


def examine(
    subject: Subject,
    beside: Beside | None,
    trial: Trial,
    rules: Rules,
    surrogates: Mapping[str, Classifier] | None = None,
    watch: Watch = lambda name, sources: lambda attack, samples: None,
    memory: Callable[[str], Memory | None] = lambda judge: None,
    *,
    self_test: bool = False,
    earlier: Earlier | None = None,
) -> Examined:
    """Attack one file from every source that there is, and the float student, if there is one, from the same ones.

    Args:
        surrogates: further sources by name; `beside.own` faced them already.
        watch: the name of a judge and its number of sources -> what is told of the progress.
        memory: the name of a judge -> what remembers the finished parts of the attack on it.
        self_test: also plant adversarial examples in a copy of the file and look whether they are found.
        earlier: holds the file against an earlier release of it.
    Raises:
        EdgekitError: the file answers with numbers that are none, or nothing that was asked for can attack it.
    """
    opened = prepare(subject, None if beside is None else beside.student, trial, surrogates)
    faced = face(opened, beside, trial, watch, memory)
    return conclude(opened, faced, rules, self_test=self_test, earlier=earlier)


def prepare(
    subject: Subject, student: Classifier | None, trial: Trial, surrogates: Mapping[str, Classifier] | None = None
) -> Opened:
    """Open a file and look whether anything that was asked for can attack it; as `examine` explains."""
    judged = one_by_one_where_needed(subject.open(), trial.images)
    # The first session that ONNX Runtime opens in a process turns this off for the thread.
    torch.set_flush_denormal(True)
    _finite(predict(judged, trial.images[:CHUNK], CHUNK), subject)
    sources = {"float": student} if student else {}
    sources |= ({subject.called: subject.twin} if subject.twin else {}) | dict(surrogates or {})
    if not any(followed(attack, judged, sources) for attack in trial.attacks):
        first = trial.attacks[0]
        missing = " and ".join(first.needs) or "source of them"
        raise EdgekitError(
            f"'{first.name}' follows gradients, and there is no {missing} for this file",
            where=subject.file,
            mend="Add an attack that needs none (nes500, square5000), or name a --source",
        )
    return Opened(subject, judged, sources, trial.images[:16])


def face(
    opened: Opened,
    beside: Beside | None,
    trial: Trial,
    watch: Watch = lambda name, sources: lambda attack, samples: None,
    memory: Callable[[str], Memory | None] = lambda judge: None,
) -> Faced:
    """Attack file and student on the samples of `trial`, and replay what fooled; as `examine` explains."""
    subject = opened.subject
    outcome = trial.run(opened.judged, opened.sources, watch(subject.name, len(opened.sources)), memory(subject.name))
    _finite(outcome.clean, subject)
    float_robust = None if beside is None else _float_robust(subject, beside, trial, watch, memory)
    crew.current().release()
    own = None if beside is None else beside.own
    replayed = _finite(predict(opened.again, outcome.adversarial, CHUNK), subject)
    outcome, replayed, check = checks.settle_all(_evidence(opened, trial, outcome, own), opened.again, replayed)
    return Faced(trial, outcome, replayed, check, own, float_robust)


def _evidence(opened: Opened, trial: Trial, outcome: Outcome, own: Outcome | None) -> checks.Evidence:
    return checks.Evidence(
        opened.judged,
        opened.sources,
        trial.attacks,
        trial.images,
        trial.labels,
        trial.index,
        trial.epsilon,
        trial.seed,
        outcome,
        None if own is None else own.adversarial,
        trial.norm,
        trial.grid,
    )


def conclude(
    opened: Opened,
    faced: Faced,
    rules: Rules,
    *,
    self_test: bool = False,
    earlier: Earlier | None = None,
    planned: Planned | None = None,
) -> Examined:
    """The verdict on a file whose attacks are over: the checks are made, and the figures held against the rules.

    Args:
        self_test, earlier: as `examine` explains them.
        planned: the look at which it was decided, where some were.
    """
    subject, trial, outcome = opened.subject, faced.trial, faced.outcome
    begin = time.perf_counter()
    found = [faced.repeats, checks.same_answer_twice(opened.judged, outcome.clean, trial.images)]
    if faced.float_robust is not None:
        found.append(checks.robust_accuracy_did_not_rise(faced.float_robust, outcome.robust, rules))
    found += checks.scrutinize(_evidence(opened, trial, outcome, faced.own), self_test=self_test)
    seconds = time.perf_counter() - begin
    fidelity = None
    if subject.twin:
        fidelity, check = checks.twin_fidelity(subject.twin, trial.images, outcome, faced.replayed)
        found.append(check)
    judgement = judge(
        opened, faced, rules, earlier=earlier, planned=planned, twin=fidelity, checks=found, checks_seconds=seconds
    )
    if not any(source != SCORES for _, source in outcome.fooled):
        judgement = replace(judgement, why=f"{judgement.why}; it rests on its scores alone, no gradients were followed")
    if subject.note:
        judgement = replace(judgement, why=f"{judgement.why}; {subject.note}")
    return Examined(judgement, outcome, faced.replayed.argmax(1), opened.judged, faced.float_robust)


def judge(
    opened: Opened, faced: Faced, rules: Rules, *, earlier: Earlier | None = None, **known: Any
) -> ArtifactVerdict:
    """What the figures alone say of a file, and what is `known` beside them, as verdict.judged takes it."""
    subject, trial, outcome, clean_right = opened.subject, faced.trial, faced.outcome, faced.clean_right
    float_clean = None if faced.own is None else faced.own.clean.argmax(1)
    judgement = verdict.judged(
        rules,
        clean_right,
        outcome.robust,
        **subject.about(),
        attacks=[_result(attack, outcome) for attack in trial.attacks if attack.name not in outcome.skipped],
        judged_on=subject.judged_on,
        float_clean_right=faced.float_clean_right,
        float_robust_right=faced.float_robust,
        agreement=None if float_clean is None else share(float_clean == outcome.clean.argmax(1)),
        baseline=None if earlier is None else earlier(trial.index, clean_right, outcome.robust, outcome.fooled, rules),
        undecidable=guessing(subject, clean_right, faced.float_clean_right, rules),
        **known,
    )
    return replace(
        judgement,
        within_one_quantum=_near(outcome.clean, subject.quantum),
        saturating_pairs=subject.saturating_pairs,
        code_ran=subject.code_ran,
    )


def _near(scores: Tensor, quantum: float | None) -> float | None:
    """The share of samples whose two best scores lie within one quantum; None where the scores have none."""
    if quantum is None or scores.shape[1] < 2:
        return None
    best = scores.topk(2, 1).values
    # A thousandth more: neighbours on a grid of floats are not one step apart to the last bit.
    return share(best[:, 0] - best[:, 1] <= 1.001 * quantum)


def _float_robust(
    subject: Subject, beside: Beside, trial: Trial, watch: Watch, memory: Callable[[str], Memory | None]
) -> Tensor:
    """(N,) bool: what the student withstands, the gradients of the file's twin included."""
    robust = beside.own.robust
    if not subject.twin:
        return robust
    # What follows no source did all that it can do to the student in `own`.
    single = tuple(attack for attack in trial.attacks if attack.gradients and not attack.needs)
    paired = tuple(attack for attack in trial.attacks if attack.needs)
    twin = {"twin": subject.twin}
    for attacks, sources in ((single, twin), (paired, twin | {"float": beside.student})):
        if attacks:
            name = f"float student under {subject.name}'s twin"
            told = replace(trial, attacks=attacks).run(beside.student, sources, watch(name, 1), memory(name))
            robust = robust & told.robust
    return robust


def _finite(answers: Tensor, subject: Subject) -> Tensor:
    if not answers.isfinite().all():
        raise EdgekitError("the file answers with infinities, or with numbers that are none", where=subject.file)
    return answers


def guessing(subject: Subject, clean_right: Tensor, float_right: Tensor | None, rules: Rules) -> str | None:
    """Why nothing can be decided of a file that does no better than guessing, or whose student does not.

    A file that guesses beside a student that knows has lost, which is a verdict.
    """
    if subject.chance is None:
        return None
    clean = verdict.accuracy(clean_right if float_right is None else float_right, rules.confidence)
    if clean.low > subject.chance:
        return None
    guess = f"on {100 * clean.value:.1f} % of the clean images, no more than guessing ({100 * subject.chance:.3g} %)"
    if float_right is not None:
        return f"the float student is right {guess}: it has no robustness to lose; train it longer"
    return (
        f"the file is right {guess}: its input or its classes may be meant otherwise "
        "(--mean, --std, --channels, --layout, --classes)"
    )


def one_by_one_where_needed(judged: Classifier, images: Tensor) -> Classifier:
    """`judged`, asked one image at a time where its answers depend on the batch (dynamic quantization)."""
    probe = images[:16]
    alone, together = predict(judged, probe, 1), predict(judged, probe, len(probe))
    if alike(alone, together).all():
        return judged
    return Wrapped(lambda batch: torch.cat([judged(image) for image in batch.split(1)]), differentiable=False)


def _result(attack: Attack, outcome: Outcome) -> AttackResult:
    by_source = {source: hit for (name, source), hit in outcome.fooled.items() if name == attack.name}
    worst = torch.stack(list(by_source.values())).any(0)
    sources = {source: share(~hit) for source, hit in by_source.items()}
    return AttackResult(attack.name, share(~worst), sources, outcome.seconds[attack.name])
