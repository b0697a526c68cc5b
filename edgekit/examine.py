"""One file under attack beside the float student: what both went through, and the verdict on the file.

It knows Classifiers only: no runs, no formats, no terminal.
"""

from collections.abc import Callable, Mapping
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
    chance: float | None = None  # accuracy by guessing, of a file that may be fed or read in the wrong way

    def about(self) -> dict[str, Any]:
        """The fields that a verdict repeats."""
        return {key: getattr(self, key) for key in ("name", "format", "precision", "file", "bytes", "sha256")}


@dataclass(frozen=True)
class Examined:
    """One file's verdict, and what it and the float student did on each sample."""

    verdict: ArtifactVerdict
    outcome: Outcome
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
) -> Examined:
    """Attack one file from every source that there is, and the float student, if there is one, from the same ones.

    Args:
        surrogates: further sources by name; `beside.own` faced them already.
        watch: the name of a judge and its number of sources -> what is told of the progress.
    Raises:
        EdgekitError: the file answers with numbers that are none, or nothing that was asked for can attack it.
    """
    judged = one_by_one_where_needed(subject.open(), trial.images)
    # The first session that ONNX Runtime opens in a process turns this off for the thread.
    torch.set_flush_denormal(True)
    _finite(predict(judged, trial.images[:CHUNK], CHUNK), subject)
    sources = {"float": beside.student} if beside else {}
    sources |= ({"twin": subject.twin} if subject.twin else {}) | dict(surrogates or {})
    if not sources and (blind := [attack.name for attack in trial.attacks if attack.gradients]):
        raise EdgekitError(
            f"no gradients go through this file, and '{blind[0]}' follows gradients",
            where=subject.file,
            mend="Name attacks that need none (square5000), or a --source",
        )
    outcome = trial.run(judged, sources, watch(subject.name, len(sources)))
    _finite(outcome.clean, subject)
    opened_again = one_by_one_where_needed(subject.open(), trial.images)
    replayed = predict(opened_again, outcome.adversarial, CHUNK)
    outcome, replay_check = settle(outcome, replayed, trial.labels)
    float_robust = None if beside is None else _float_robust(subject, beside, trial, watch)
    checks = [replay_check, _same_answer(judged, outcome.clean, trial.images)]
    if float_robust is not None:
        checks.append(_no_gain(float_robust, outcome, rules))
    fidelity = None
    if subject.twin:
        fidelity = _fidelity(subject.twin, trial.images, outcome, replayed)
        why = f"the twin decides as the file does on {100 * fidelity.agreement:.2f} % of clean and adversarial images"
        checks.append(Check("twin_fidelity", fidelity.agreement >= FAITHFUL, fidelity.agreement, why))
    clean_right = outcome.clean.argmax(1) == trial.labels
    float_clean = None if beside is None else beside.own.clean.argmax(1)
    judgement = verdict.judged(
        rules,
        clean_right,
        outcome.robust,
        **subject.about(),
        attacks=[_result(attack, outcome) for attack in trial.attacks],
        judged_on=subject.judged_on,
        float_clean_right=None if float_clean is None else float_clean == trial.labels,
        float_robust_right=float_robust,
        agreement=None if float_clean is None else share(float_clean == outcome.clean.argmax(1)),
        twin=fidelity,
        checks=checks,
        undecidable=_guessing(subject, clean_right, rules),
    )
    return Examined(judgement, outcome, float_robust)


def _float_robust(subject: Subject, beside: Beside, trial: Trial, watch: Watch) -> Tensor:
    """(N,) bool: what the student withstands, the gradients of the file's twin included."""
    following = tuple(attack for attack in trial.attacks if attack.gradients)
    if not subject.twin or not following:  # the other attacks follow no source: `own` holds all that they can do
        return beside.own.robust
    under_twin = replace(trial, attacks=following).run(
        beside.student, {"twin": subject.twin}, watch(f"float student under {subject.name}'s twin", 1)
    )
    return beside.own.robust & under_twin.robust


def _finite(answers: Tensor, subject: Subject) -> None:
    if not answers.isfinite().all():
        raise EdgekitError("the file answers with infinities, or with numbers that are none", where=subject.file)


def _guessing(subject: Subject, clean_right: Tensor, rules: Rules) -> str | None:
    """Why nothing can be decided of a file that does no better than guessing."""
    if subject.chance is None:
        return None
    clean = verdict.accuracy(clean_right, rules.confidence)
    if clean.low > subject.chance:
        return None
    return (
        f"the file is right on {100 * clean.value:.1f} % of the clean images, no more than guessing "
        f"({100 * subject.chance:.3g} %): its input or its classes may be meant otherwise "
        "(--mean, --std, --channels, --layout, --classes)"
    )


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
