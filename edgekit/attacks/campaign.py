"""Every attack from every source against one judge: the worst case of each sample, in chunks that never change."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from edgekit.attacks import Attack
from edgekit.attacks.diva import Pair
from edgekit.attacks.grid import Grid, require
from edgekit.classifier import Classifier, predict
from edgekit.randomness import derive

CHUNK = 250  # samples that are attacked together; fixed, so that a result depends on the seed and on nothing else

CALL = 8  # images that a network could answer in the time that a call takes beside them (measured on MobileNetV2)
TOGETHER = "+"  # between the names of sources that one attack follows at once
SCORES = "scores"  # the source of an attack that follows no gradient: what the judge answers

_ROBUST, _CLEAN = -1, -2  # in `winner`; any other number counts the pairs (attack, source)


@dataclass
class Meter:
    """Counts what attacks cost, in images judged: a pass with gradients counts as three, a call as CALL more images.

    Counts and no seconds: what is decided by them is the same on every machine.
    """

    passes: int = 0

    def over(self, judge: Classifier, sources: Mapping[str, Classifier]) -> tuple[Classifier, dict[str, Classifier]]:
        """The same models, counted; where a source is the judge itself they stay one, which attacks make use of."""
        climbed = {name: _Counted(source, self, 3) for name, source in sources.items()}
        same = next((name for name, source in sources.items() if source is judge), None)
        return climbed[same] if same is not None else _Counted(judge, self, 1), dict(climbed)


class _Counted:
    def __init__(self, classifier: Classifier, meter: Meter, cost: int) -> None:
        self.classifier, self.meter, self.cost = classifier, meter, cost
        self.differentiable = classifier.differentiable

    def __call__(self, images: Tensor) -> Tensor:
        self.meter.passes += self.cost * (len(images) + CALL)
        return self.classifier(images)


@dataclass(frozen=True)
class Outcome:
    """What N samples went through before one judge.

    Attributes:
        clean: (N, K) logits of the judge on the clean images.
        fooled: for each (attack, source), (N,) bool: whether any of its starts fooled; True where wrong when clean.
        adversarial: (N, C, H, W): the clean image where that is wrong; else the image of the first attack and source
            that fooled; where none did, the strongest of the first one.
        winner: (N,) int64, the place in `fooled` of the pair that won; -1 where none did, -2 where wrong when clean.
        seconds: for each attack that ran, the time that it took from all its sources.
        skipped: names of the attacks that no source was there for.
        passes: what the attacks cost, as a Meter counts.
    """

    clean: Tensor
    fooled: dict[tuple[str, str], Tensor]
    adversarial: Tensor
    winner: Tensor
    seconds: dict[str, float]
    skipped: tuple[str, ...] = ()
    passes: int = 0

    @property
    def robust(self) -> Tensor:
        """(N,) bool: right when clean and under every attack from every source."""
        return self.winner == _ROBUST

    def won(self) -> tuple[list[str], list[str]]:
        """Names of the attack and the source that won each sample: "clean" and "" where it is wrong when clean, "" and
        "" where it is robust."""
        names = {_ROBUST: ("", ""), _CLEAN: ("clean", ""), **dict(enumerate(self.fooled))}
        attacks, sources = zip(*(names[number] for number in self.winner.tolist()), strict=True)
        return list(attacks), list(sources)


@dataclass(frozen=True)
class Part:
    """What one attack from one source made of one chunk of M samples.

    Attributes:
        adversarial: (M, C, H, W): the clean image where that is wrong; else the one of the first start that fooled;
            where none did, the strongest of the first start.
        fooled: (M,) bool; True where wrong when clean.
        seconds, passes: what it cost.
    """

    adversarial: Tensor
    fooled: Tensor
    seconds: float
    passes: int = 0


ELSEWHERE = Part(torch.empty(0), torch.empty(0), 0.0)  # the part that another process does, seen from a helper


class Memory(Protocol):
    """Where finished parts are kept, so that an interrupted `confront` goes on where it was.

    It belongs to one call: the same judge, sources, samples, seed, epsilon and grid.
    """

    def recall(self, attack: str, source: str, chunk: int) -> Part | None:
        """The part that was kept, or None; ELSEWHERE where this process is to pass it over."""
        ...

    def keep(self, attack: str, source: str, chunk: int, part: Part) -> None: ...


class Forgetful:
    """The Memory that keeps nothing."""

    def recall(self, attack: str, source: str, chunk: int) -> Part | None:
        return None

    def keep(self, attack: str, source: str, chunk: int, part: Part) -> None:
        pass


def followed(attack: Attack, judge: Classifier, sources: Mapping[str, Classifier]) -> dict[str, Classifier]:
    """The sources that `attack` runs from, one run each, by name; none where what it needs is missing."""
    if not attack.gradients:
        return {SCORES: judge}
    if not attack.needs:
        return dict(sources)
    if not set(attack.needs) <= set(sources):
        return {}
    return {TOGETHER.join(attack.needs): Pair(*(sources[name] for name in attack.needs))}


def confront(
    judge: Classifier,
    sources: Mapping[str, Classifier],
    attacks: Sequence[Attack],
    images: Tensor,
    labels: Tensor,
    index: Tensor,
    *,
    seed: int,
    epsilon: float,
    grid: bool = False,
    memory: Memory | None = None,
    advance: Callable[[Attack, int], None] = lambda attack, samples: None,
) -> Outcome:
    """Run every attack from every source, with all its starts, on all samples.

    Args:
        judge: the Classifier to fool.
        sources: differentiable Classifiers by name, whose gradients are followed, in this order.
        images: (N, C, H, W) float32 in [0, 1].
        labels: (N,) int64, the true classes.
        index: (N,) int64, each sample's place in the data: start r of sample i is drawn from (seed, r, index[i]).
        epsilon: radius, in units of the [0, 1] range.
        grid: whether the judge is shown, and `adversarial` holds, only images of uint8 values.
        memory: is asked for each part before it is computed, and told of it afterwards.
        advance: told how many samples an attack has done with, of N for each source that it follows.

    Raises:
        EdgekitError: with `grid`, the clean images are not uint8 values.
    """
    if grid:
        require(images)
    memory = memory or Forgetful()
    meter, passes = Meter(), 0
    clean = predict(judge, images, CHUNK)
    judge, sources = meter.over(judge, sources)
    wrong = clean.argmax(1) != labels
    winner = torch.where(wrong, _CLEAN, _ROBUST)
    adversarial, fooled, seconds = images.clone(), {}, {}
    for attack in attacks:
        shown = Grid(judge, epsilon, attack.norm) if grid else judge
        for name, source in followed(attack, judge, sources).items():
            hits = wrong.clone()
            for number, chunk in enumerate(torch.arange(len(labels), device=images.device).split(CHUNK)):
                part = memory.recall(attack.name, name, number)
                if part is None:
                    begin, before = time.perf_counter(), meter.passes
                    found, hit = _starts(
                        attack, source, shown, images[chunk], labels[chunk], index[chunk], wrong[chunk], seed, epsilon
                    )
                    part = Part(found, hit, time.perf_counter() - begin, meter.passes - before)
                    memory.keep(attack.name, name, number, part)
                if part is ELSEWHERE:
                    continue
                free = winner[chunk] == _ROBUST
                take = free if not fooled else free & part.fooled
                adversarial[chunk[take]] = part.adversarial[take]
                winner[chunk[free & part.fooled]] = len(fooled)
                hits[chunk] |= part.fooled
                seconds[attack.name] = seconds.get(attack.name, 0.0) + part.seconds
                passes += part.passes
                advance(attack, len(chunk))
            fooled[attack.name, name] = hits
    skipped = tuple(attack.name for attack in attacks if attack.name not in seconds)
    return Outcome(clean, fooled, adversarial, winner, seconds, skipped, passes)


def _starts(
    attack: Attack,
    source: Classifier,
    judge: Classifier,
    images: Tensor,
    labels: Tensor,
    index: Tensor,
    wrong: Tensor,
    seed: int,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    """All starts of one attack on one chunk; a sample that one fooled, or that is wrong when clean, takes no other."""
    adversarial, fooled = images.clone(), wrong.clone()
    for restart in range(attack.restarts):
        left = (~fooled).nonzero().squeeze(1)
        if not len(left):
            break
        seeds = derive(seed, restart, samples=index[left])
        found, hit = attack.run(source, judge, images[left], labels[left], seeds=seeds, epsilon=epsilon)
        take = hit if restart else torch.ones_like(hit)
        adversarial[left[take]] = found[take]
        fooled[left[hit]] = True
    return adversarial, fooled
