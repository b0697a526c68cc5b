"""Every attack from every source against one judge: the worst case of each sample, in chunks that never change."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgekit.attacks import Attack
from edgekit.classifier import Classifier, predict
from edgekit.randomness import derive

CHUNK = 250  # samples that are attacked together; fixed, so that a result depends on the seed and on nothing else

SCORES = "scores"  # the source of an attack that follows no gradient: what the judge answers

_ROBUST, _CLEAN = -1, -2  # in `winner`; any other number counts the pairs (attack, source)


@dataclass(frozen=True)
class Outcome:
    """What N samples went through before one judge.

    Attributes:
        clean: (N, K) logits of the judge on the clean images.
        fooled: for each (attack, source), (N,) bool: whether any of its starts fooled; True where wrong when clean.
        adversarial: (N, C, H, W): the clean image where that is wrong; else the image of the first attack and source
            that fooled; where none did, the strongest of the first one.
        winner: (N,) int64, the place in `fooled` of the pair that won; -1 where none did, -2 where wrong when clean.
        seconds: for each attack, the time that it took from all its sources.
    """

    clean: Tensor
    fooled: dict[tuple[str, str], Tensor]
    adversarial: Tensor
    winner: Tensor
    seconds: dict[str, float]

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
        advance: told how many samples an attack has done with, of N for each source (of N alone without gradients).
    """
    clean = predict(judge, images, CHUNK)
    wrong = clean.argmax(1) != labels
    winner = torch.where(wrong, _CLEAN, _ROBUST)
    adversarial, fooled, seconds = images.clone(), {}, {}
    for attack in attacks:
        begin = time.perf_counter()
        for name, source in (sources if attack.gradients else {SCORES: judge}).items():
            hits = wrong.clone()
            for chunk in torch.arange(len(labels)).split(CHUNK):
                left = chunk
                for restart in range(attack.restarts):
                    seeds = derive(seed, restart, samples=index[left])
                    found, hit = attack.run(source, judge, images[left], labels[left], seeds=seeds, epsilon=epsilon)
                    first = not fooled and restart == 0
                    take = winner[left] == _ROBUST if first else hit & (winner[left] == _ROBUST)
                    adversarial[left[take]] = found[take]
                    winner[left[hit & take]] = len(fooled)
                    hits[left[hit]] = True
                    left = left[~hit]
                    if not len(left):
                        break
                advance(attack, len(chunk))
            fooled[attack.name, name] = hits
        seconds[attack.name] = time.perf_counter() - begin
    return Outcome(clean, fooled, adversarial, winner, seconds)
