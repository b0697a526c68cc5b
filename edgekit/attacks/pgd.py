"""Projected gradient descent: Madry et al., ICLR 2018, arXiv:1706.06083; what all attacks promise: search.py."""

import torch
from torch import Tensor

from edgekit.attacks.losses import LOSSES, Loss, aim
from edgekit.attacks.norms import NORMS, slope
from edgekit.attacks.search import Search
from edgekit.classifier import Classifier
from edgekit.errors import choose
from edgekit.randomness import normal

SMALL = 0.001  # standard deviation of the start of TRADES: just far enough for the KL divergence to have a slope


def pgd(
    source: Classifier,
    judge: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    seeds: Tensor | None,
    epsilon: float = 8 / 255,
    step_size: float | None = None,
    steps: int = 20,
    loss: str = "ce",
    norm: str = "Linf",
) -> tuple[Tensor, Tensor]:
    """Search the epsilon ball around each image for an input that fools `judge`.

    Args:
        seeds: sample i starts where seeds[i] says: anywhere in the ball, with the loss "kl" close to the image. None
            starts at the image, and with "kl", which is flat there, draws from 0.
        step_size: length of a step, in units of the [0, 1] range; epsilon / 4 where it is not given.
        steps: number of steps, at least 1; the judge sees the start and what each step makes of it.
        loss: what is climbed, a key of LOSSES.

    Raises:
        EdgekitError: `loss` is not in LOSSES, or `norm` not in NORMS.
    """
    objective, space = choose(LOSSES, loss, "loss"), choose(NORMS, norm, "norm")
    if loss == "kl":
        start = images + SMALL * normal(torch.zeros_like(labels) if seeds is None else seeds, images)
    else:
        start = images if seeds is None else space.start(seeds, images, epsilon)
    step_size = epsilon / 4 if step_size is None else step_size
    goal, search = aim(loss, source, images, labels), Search(judge, images, labels)
    return climb(search, source, judge, objective, goal, start, epsilon, step_size, steps, norm)


def climb(
    search: Search,
    source: Classifier,
    judge: Classifier,
    objective: Loss,
    goal: Tensor,
    start: Tensor,
    epsilon: float,
    step_size: float,
    steps: int,
    norm: str,
) -> tuple[Tensor, Tensor]:
    """Steps of `step_size` from `start` (N, C, H, W) up the slope of `objective` against `goal` (N, ...)."""
    space = NORMS[norm]
    x = space.project(start[search.active], search.center, epsilon)
    for step in range(steps + 1):
        if search.over:
            break
        shared, wanted = source is judge and step < steps, goal[search.active]
        logits, hit = search.show(x, graph=shared)
        # Taken before the fooled samples leave: the pass that judged them serves the others.
        gradient = slope(objective(logits, wanted), x)[~hit] if shared and not hit.all() else None
        x = x.detach()[~hit]
        if step == steps or search.over:
            break
        if gradient is None:
            gradient = slope(objective(source(x.requires_grad_()), goal[search.active]), x)
        # The projection stays outside the graph: inside, it would zero the gradient of pixels at the border.
        x = space.project(x.detach() + step_size * space.steepest(gradient), search.center, epsilon)
    return search.result
