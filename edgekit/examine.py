"""One file under attack beside the float student: what both went through, and the verdict on the file.

It knows Classifiers only: no runs, no formats, no terminal.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from edgekit import checks, verdict
from edgekit.attacks import Attack
from edgekit.attacks.campaign import CHUNK, SCORES, Memory, Outcome, confront, followed
from edgekit.checks import alike, share
from edgekit.classifier import Classifier, Wrapped, predict
from edgekit.errors import EdgekitError
from edgekit.verdict import ArtifactVerdict, AttackResult, Rules

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

    def run(
        self,
        judge: Classifier,
        sources: Mapping[str, Classifier],
        advance: Advance = lambda *_: None,
        memory: Memory | None = None,
    ) -> Outcome:
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
            memory=memory,
            advance=advance,
        )


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
    chance: float | None = None  # accuracy by guessing, which nothing can be decided about

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
) -> Examined:
    """Attack one file from every source that there is, and the float student, if there is one, from the same ones.

    Args:
        surrogates: further sources by name; `beside.own` faced them already.
        watch: the name of a judge and its number of sources -> what is told of the progress.
        memory: the name of a judge -> what remembers the finished parts of the attack on it.
        self_test: also plant adversarial examples in a copy of the file and look whether they are found.
    Raises:
        EdgekitError: the file answers with numbers that are none, or nothing that was asked for can attack it.
    """
    judged = one_by_one_where_needed(subject.open(), trial.images)
    # The first session that ONNX Runtime opens in a process turns this off for the thread.
    torch.set_flush_denormal(True)
    _finite(predict(judged, trial.images[:CHUNK], CHUNK), subject)
    sources = {"float": beside.student} if beside else {}
    sources |= ({"twin": subject.twin} if subject.twin else {}) | dict(surrogates or {})
    if not any(followed(attack, judged, sources) for attack in trial.attacks):
        first = trial.attacks[0]
        missing = " and ".join(first.needs) or "source of them"
        raise EdgekitError(
            f"'{first.name}' follows gradients, and there is no {missing} for this file",
            where=subject.file,
            mend="Add an attack that needs none (nes500, square5000), or name a --source",
        )
    outcome = trial.run(judged, sources, watch(subject.name, len(sources)), memory(subject.name))
    _finite(outcome.clean, subject)
    float_robust = None if beside is None else _float_robust(subject, beside, trial, watch, memory)
    evidence = checks.Evidence(
        judged,
        sources,
        trial.attacks,
        trial.images,
        trial.labels,
        trial.index,
        trial.epsilon,
        trial.seed,
        outcome,
        None if beside is None else beside.own.adversarial,
        trial.norm,
        trial.grid,
    )
    opened_again = one_by_one_where_needed(subject.open(), trial.images)
    replayed = _finite(predict(opened_again, outcome.adversarial, CHUNK), subject)
    outcome, replayed, replay_check = checks.settle_all(evidence, opened_again, replayed)
    begin = time.perf_counter()
    found = [replay_check, checks.same_answer_twice(judged, outcome.clean, trial.images)]
    if float_robust is not None:
        found.append(checks.robust_accuracy_did_not_rise(float_robust, outcome.robust, rules))
    found += checks.scrutinize(replace(evidence, outcome=outcome), self_test=self_test)
    seconds = time.perf_counter() - begin
    fidelity = None
    if subject.twin:
        fidelity, check = checks.twin_fidelity(subject.twin, trial.images, outcome, replayed)
        found.append(check)
    clean_right = outcome.clean.argmax(1) == trial.labels
    float_clean = None if beside is None else beside.own.clean.argmax(1)
    judgement = verdict.judged(
        rules,
        clean_right,
        outcome.robust,
        **subject.about(),
        attacks=[_result(attack, outcome) for attack in trial.attacks if attack.name not in outcome.skipped],
        judged_on=subject.judged_on,
        float_clean_right=None if float_clean is None else float_clean == trial.labels,
        float_robust_right=float_robust,
        agreement=None if float_clean is None else share(float_clean == outcome.clean.argmax(1)),
        twin=fidelity,
        checks=found,
        checks_seconds=seconds,
        undecidable=_guessing(
            subject, clean_right, None if float_clean is None else float_clean == trial.labels, rules
        ),
    )
    if not any(source != SCORES for _, source in outcome.fooled):
        judgement = replace(judgement, why=f"{judgement.why}; it rests on its scores alone, no gradients were followed")
    return Examined(judgement, outcome, replayed.argmax(1), judged, float_robust)


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


def _guessing(subject: Subject, clean_right: Tensor, float_right: Tensor | None, rules: Rules) -> str | None:
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
