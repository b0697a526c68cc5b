"""DIVA: Hao et al., MLSys 2022, arXiv:2204.10933: fools the file on the device and not the model that it was made from.

Whoever compares the two does not notice. It needs both: the twin of the file and the float model.
"""

import torch
from torch import Tensor

from edgekit.attacks.norms import NORMS
from edgekit.attacks.pgd import climb
from edgekit.attacks.search import Search
from edgekit.classifier import Classifier
from edgekit.errors import choose

NEEDS = ("twin", "float")  # the sources that a Pair holds
BALANCE = 1.0  # the paper's c: how much the twin's answer weighs against the float model's


class Pair:
    """Classifiers as one source: logits (N, 2, K), in the order of NEEDS."""

    differentiable = True

    def __init__(self, *members: Classifier) -> None:
        self._members = members

    def __call__(self, images: Tensor) -> Tensor:
        return torch.stack([member(images) for member in self._members], 1)


def divergence(logits: Tensor, labels: Tensor) -> Tensor:
    """Probability of the true class in the float model minus that in the twin (N,), of `logits` (N, 2, K)."""
    twin, original = logits.softmax(2).gather(2, labels[:, None, None].expand(-1, 2, 1)).squeeze(2).unbind(1)
    return original - BALANCE * twin


def diva(
    source: Classifier,
    judge: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    seeds: Tensor | None,
    epsilon: float = 8 / 255,
    step_size: float | None = None,
    steps: int = 20,
    norm: str = "Linf",
) -> tuple[Tensor, Tensor]:
    """PGD on the difference of the two; whether it fooled is the file's word alone.

    Args:
        source: a Pair.
        seeds: sample i starts where seeds[i] says, anywhere in the ball. None starts at the image.
        step_size: length of a step, in units of the [0, 1] range; epsilon / 4 where it is not given.
        steps: number of steps, at least 1.

    Raises:
        EdgekitError: `norm` is not in NORMS.
    """
    space, search = choose(NORMS, norm, "norm"), Search(judge, images, labels)
    start = images if seeds is None else space.start(seeds, images, epsilon)
    step_size = epsilon / 4 if step_size is None else step_size
    return climb(search, source, judge, divergence, labels, start, epsilon, step_size, steps, norm)
