"""One file under attack beside the float student: what both went through, and the verdict on the file.

It knows Classifiers only: no runs, no formats, no terminal.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from edgekit import verdict
from edgekit.attacks import Attack
from edgekit.attacks.campaign import CHUNK, Outcome, confront
from edgekit.classifier import Classifier, Wrapped, predict
from edgekit.errors import EdgekitError
from edgekit.verdict import ArtifactVerdict, AttackResult, Check, Rules, Twin

FAITHFUL = 0.99  # agreement of a twin with its file below which its gradients are not those of the file
ROUNDING = 1e-4  # two answers of one file that differ by less than this share of its largest logit are the same

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


def examine(
    subject: Subject,
    student: Classifier,
    own: Outcome,
    trial: Trial,
    rules: Rules,
    watch: Watch = lambda name, sources: lambda attack, samples: None,
) -> Examined:
    """Attack one file from every source that there is, and the float student from the same ones.

    Args:
        student: the float student, differentiable.
        own: what the student went through under its own gradients, as `trial.run` gives it.
        watch: the name of a judge and its number of sources -> what is told of the progress.
    Raises:
        EdgekitError: the file answers with numbers that are none.
    """
    judged = one_by_one_where_needed(subject.open(), trial.images)
    # The first session that ONNX Runtime opens in a process turns this off for the thread.
    torch.set_flush_denormal(True)
    sources: dict[str, Classifier] = {"float": student} | ({"twin": subject.twin} if subject.twin else {})
    outcome = trial.run(judged, sources, watch(subject.name, len(sources)))
    if not outcome.clean.isfinite().all():
        raise EdgekitError("the file answers with infinities, or with numbers that are none", where=subject.file)
    float_robust = own.robust
    following = tuple(attack for attack in trial.attacks if attack.gradients)
    if subject.twin and following:  # the other attacks follow no source: `own` holds all that they can do
        under_twin = replace(trial, attacks=following).run(
            student, {"twin": subject.twin}, watch(f"float student under {subject.name}'s twin", 1)
        )
        float_robust = float_robust & under_twin.robust
    opened_again = one_by_one_where_needed(subject.open(), trial.images)
    replayed = predict(opened_again, outcome.adversarial, CHUNK)
    outcome, replay_check = settle(outcome, replayed, trial.labels)
    checks = [replay_check, _same_answer(judged, outcome.clean, trial.images), _no_gain(float_robust, outcome, rules)]
    fidelity = None
    if subject.twin:
        fidelity = _fidelity(subject.twin, trial.images, outcome, replayed)
        why = f"the twin decides as the file does on {100 * fidelity.agreement:.2f} % of clean and adversarial images"
        checks.append(Check("twin_fidelity", fidelity.agreement >= FAITHFUL, fidelity.agreement, why))
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
        checks=checks,
    )
    return Examined(judgement, outcome, float_robust)


def one_by_one_where_needed(judged: Classifier, images: Tensor) -> Classifier:
    """`judged`, asked one image at a time where its answers depend on the batch (dynamic quantization)."""
    probe = images[:16]
    alone, together = predict(judged, probe, 1), predict(judged, probe, len(probe))
    if _alike(alone, together).all():
        return judged
    return Wrapped(lambda batch: torch.cat([judged(image) for image in batch.split(1)]), differentiable=False)


def settle(outcome: Outcome, replayed: Tensor, labels: Tensor) -> tuple[Outcome, Check]:
    """Hold the outcome against the answers (N, K) that a freshly opened file gives to the adversarial images.

    A sample whose two highest logits are equal up to rounding may change sides with the batch that it sits in. There
    the replay, which others can repeat, decides. Any other difference fails the check.
    """
    fooled = replayed.argmax(1) != labels
    differs = fooled == outcome.robust
    others = replayed.scatter(1, labels[:, None], -torch.inf).amax(1)
    tied = (others - replayed.gather(1, labels[:, None])[:, 0]).abs() <= ROUNDING * replayed.abs().max()
    kept = share(~differs)
    passed = bool((tied | ~differs).all())
    saved, lost = differs & tied & ~fooled, differs & tied & fooled
    if saved.any() or lost.any():
        hits = {pair: (hit & ~saved) | lost for pair, hit in outcome.fooled.items()}
        winner = outcome.winner.masked_fill(saved, -1).masked_fill(lost, 0)
        outcome = replace(outcome, fooled=hits, winner=winner)
    why = f"a freshly opened file repeats its answer to {100 * kept:.2f} % of the adversarial images"
    return outcome, Check("fooled_replayed", passed, kept, why)


def _alike(first: Tensor, second: Tensor) -> Tensor:
    """(N,) bool: the same decision, and the same logits (N, K) up to rounding."""
    room = ROUNDING * max(first.abs().max().item(), second.abs().max().item())
    return (first.argmax(1) == second.argmax(1)) & ((first - second).abs() <= room).all(1)


def _same_answer(judged: Classifier, clean: Tensor, images: Tensor) -> Check:
    """Whether the file says of the first chunk what it said before."""
    same = share(_alike(predict(judged, images[:CHUNK], CHUNK), clean[:CHUNK]))
    why = f"{100 * same:.2f} % of {min(CHUNK, len(images))} images get the same answer when asked again"
    return Check("same_answer_twice", same == 1, same, why)


def _no_gain(float_robust: Tensor, outcome: Outcome, rules: Rules) -> Check:
    change = verdict.compare(float_robust, outcome.robust, rules.confidence)
    ends = f"{100 * change.low:+.1f} to {100 * change.high:+.1f}"
    why = f"robust accuracy changed by {100 * change.value:+.1f} points ({ends})"
    if change.low > 0:
        why += "; a file that gains so much hides its gradients until the contrary is shown"
    return Check("robust_accuracy_did_not_rise", change.low <= 0, change.value, why)


def _fidelity(copy: Classifier, images: Tensor, outcome: Outcome, replayed: Tensor) -> Twin:
    said = torch.cat([outcome.clean, replayed])
    copied = torch.cat([predict(copy, images, CHUNK), predict(copy, outcome.adversarial, CHUNK)])
    return Twin(share(said.argmax(1) == copied.argmax(1)), (said - copied).abs().max().item())


def _result(attack: Attack, outcome: Outcome) -> AttackResult:
    by_source = {source: hit for (name, source), hit in outcome.fooled.items() if name == attack.name}
    worst = torch.stack(list(by_source.values())).any(0)
    sources = {source: share(~hit) for source, hit in by_source.items()}
    return AttackResult(attack.name, share(~worst), sources, outcome.seconds[attack.name])


def share(right: Tensor) -> float:
    """The fraction of (N,) booleans that are true."""
    return int(right.sum()) / len(right)
