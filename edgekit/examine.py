"""One file under attack beside the float student: what both went through, and the verdict on the file.

It knows Classifiers only: no runs, no formats, no terminal.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from edgekit import checks, verdict
from edgekit.attacks import Attack
from edgekit.attacks.campaign import CHUNK, Outcome, confront
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

    def run(self, judge: Classifier, sources: dict[str, Classifier], advance: Advance = lambda *_: None) -> Outcome:
        return confront(
            judge,
            sources,
            self.attacks,
            self.images,
            self.labels,
            self.index,
            seed=self.seed,
            epsilon=self.epsilon,
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

    def about(self) -> dict[str, Any]:
        """The fields that a verdict repeats."""
        return {key: getattr(self, key) for key in ("name", "format", "precision", "file", "bytes", "sha256")}


@dataclass(frozen=True)
class Examined:
    """One file's verdict, and what it and the float student did on each sample."""

    verdict: ArtifactVerdict
    outcome: Outcome
    float_robust: Tensor  # (N,) bool, under all that the file faced
    check_seconds: float  # of the tests of the attack itself


def examine(
    subject: Subject,
    student: Classifier,
    own: Outcome,
    trial: Trial,
    rules: Rules,
    watch: Watch = lambda name, sources: lambda attack, samples: None,
    *,
    self_test: bool = False,
) -> Examined:
    """Attack one file from every source that there is, and the float student from the same ones.

    Args:
        student: the float student, differentiable.
        own: what the student went through under its own gradients, as `trial.run` gives it.
        watch: the name of a judge and its number of sources -> what is told of the progress.
        self_test: also plant adversarial examples in a copy of the file and look whether they are found.
    Raises:
        EdgekitError: the file answers with numbers that are none.
    """
    judged = one_by_one_where_needed(subject.open(), trial.images)
    # The first session that ONNX Runtime opens in a process turns this off for the thread.
    torch.set_flush_denormal(True)
    sources: dict[str, Classifier] = {"float": student} | ({"twin": subject.twin} if subject.twin else {})
    meter = checks.Meter()
    outcome = trial.run(meter.judging(judged), meter.climbing(sources), watch(subject.name, len(sources)))
    _finite(outcome.clean, subject)
    float_robust = own.robust
    following = tuple(attack for attack in trial.attacks if attack.gradients)
    if subject.twin and following:  # the other attacks follow no source: `own` holds all that they can do
        under_twin = replace(trial, attacks=following).run(
            student, {"twin": subject.twin}, watch(f"float student under {subject.name}'s twin", 1)
        )
        float_robust = float_robust & under_twin.robust
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
        meter.passes,
        own.adversarial,
    )
    opened_again = one_by_one_where_needed(subject.open(), trial.images)
    replayed = _finite(predict(opened_again, outcome.adversarial, CHUNK), subject)
    outcome, replayed, replay_check = checks.settle_all(evidence, opened_again, replayed)
    begin = time.perf_counter()
    found = [
        replay_check,
        checks.same_answer_twice(judged, outcome.clean, trial.images),
        checks.robust_accuracy_did_not_rise(float_robust, outcome.robust, rules),
        *checks.scrutinize(replace(evidence, outcome=outcome), self_test=self_test),
    ]
    seconds = time.perf_counter() - begin
    fidelity = None
    if subject.twin:
        fidelity, check = checks.twin_fidelity(subject.twin, trial.images, outcome, replayed)
        found.append(check)
    judgement = verdict.judged(
        rules,
        outcome.clean.argmax(1) == trial.labels,
        outcome.robust,
        **subject.about(),
        attacks=[_result(attack, outcome) for attack in trial.attacks],
        judged_on=subject.judged_on,
        float_clean_right=own.clean.argmax(1) == trial.labels,
        float_robust_right=float_robust,
        agreement=share(own.clean.argmax(1) == outcome.clean.argmax(1)),
        twin=fidelity,
        checks=found,
    )
    return Examined(judgement, outcome, float_robust, seconds)


def _finite(answers: Tensor, subject: Subject) -> Tensor:
    if not answers.isfinite().all():
        raise EdgekitError("the file answers with infinities, or with numbers that are none", where=subject.file)
    return answers


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
