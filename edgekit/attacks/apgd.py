"""Auto-PGD: Croce and Hein, ICML 2020, arXiv:2003.01690, algorithm 1; what all attacks promise: search.py."""

import torch
from torch import Tensor

from edgekit.attacks.losses import LOSSES, Loss, aim, towards
from edgekit.attacks.norms import NORMS, Norm, slope
from edgekit.attacks.search import Search
from edgekit.attacks.targets import likeliest
from edgekit.classifier import Classifier
from edgekit.errors import choose
from edgekit.randomness import derive

MOMENTUM = 0.75  # the paper's alpha: the share of the gradient's step, the rest is inertia
RISING = 0.75  # its rho: the share of steps that must have raised the loss for a step size to stay


def apgd(
    source: Classifier,
    judge: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    seeds: Tensor | None,
    epsilon: float = 8 / 255,
    steps: int = 100,
    loss: str = "ce",
    norm: str = "Linf",
) -> tuple[Tensor, Tensor]:
    """Search the epsilon ball with momentum and a step size that each sample halves for itself.

    The first step has twice the radius as its length. At each checkpoint a sample whose loss did not rise often enough
    goes on from the best point that it has seen, with half of its step.

    Args:
        seeds: sample i starts where seeds[i] says, anywhere in the ball. None starts at the image.
        steps: number of steps, at least 1.
        loss: what is climbed, a key of LOSSES.

    Raises:
        EdgekitError: `loss` is not in LOSSES, or is not defined for so few classes; `norm` is not in NORMS.
    """
    objective, space = choose(LOSSES, loss, "loss"), choose(NORMS, norm, "norm")
    start = images if seeds is None else space.start(seeds, images, epsilon)
    search = Search(judge, images, labels)
    climb(search, source, judge, objective, aim(loss, source, images, labels), start, epsilon, steps, space)
    return search.result


def targeted(
    source: Classifier,
    judge: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    seeds: Tensor | None,
    epsilon: float = 8 / 255,
    steps: int = 100,
    targets: int = 9,
    norm: str = "Linf",
) -> tuple[Tensor, Tensor]:
    """The same on the targeted difference of logits ratio, towards one wrong class after the other.

    With two or three classes it is the plain difference: what the ratio divides by takes a fourth.

    Args:
        seeds: where sample i starts, anew for each target. None starts at the image.
        steps: number of steps for each target, at least 1.
        targets: how many wrong classes, from the one that `source` finds likeliest on the clean image downwards; all
            where there are no more.

    Raises:
        EdgekitError: `norm` is not in NORMS.
    """
    space, search = choose(NORMS, norm, "norm"), Search(judge, images, labels)
    for rank, target in enumerate(likeliest(source, images, labels, targets)):
        start = images if seeds is None else space.start(derive(rank, samples=seeds), images, epsilon)
        pairs = torch.stack([labels, target], 1)
        climb(search, source, judge, towards, pairs, start, epsilon, steps, space)
    return search.result


def climb(
    search: Search,
    source: Classifier,
    judge: Classifier,
    objective: Loss,
    goal: Tensor,
    start: Tensor,
    epsilon: float,
    steps: int,
    space: Norm,
) -> None:
    """All steps from `start` (N, C, H, W) up `objective` against `goal` (N, ...), for the samples still active."""
    x = space.project(start[search.active], search.center, epsilon)
    never = x.new_full(search.active.shape, -torch.inf)
    # What each sample that is not fooled yet carries from step to step.
    state = {
        "x": x,
        "before": x,
        "best": x,
        "best_gradient": torch.zeros_like(x),
        "value": never,  # of the last iterate, on the source
        "top": never,  # of the best one
        "top_then": never,  # the same at the last checkpoint
        "rises": torch.zeros_like(search.active),
        "size": torch.full_like(never, 2 * epsilon),
        "halved": torch.ones_like(search.active, dtype=torch.bool),  # no comparison with a checkpoint that was not
    }
    due, begun = checkpoints(steps), 0
    for step in range(steps + 1):
        if search.over:
            return
        x, wanted = state["x"].detach(), goal[search.active]  # a view, of which alone gradients are asked
        shared = source is judge and step < steps
        logits, hit = search.show(x, graph=shared)
        if step == steps or search.over:
            return
        state = {name: part[~hit] for name, part in state.items()}
        if shared:
            seen = objective(logits, wanted)
            value, gradient = seen.detach()[~hit], slope(seen, x)[~hit]
        else:
            x = state["x"].detach().requires_grad_()
            seen = objective(source(x), wanted[~hit])
            value, gradient = seen.detach(), slope(seen, x)
        state["rises"] = state["rises"] + ((value > state["value"]) if step else 0)
        state["value"] = value
        better = value > state["top"]
        state["top"] = torch.where(better, value, state["top"])
        state["best"] = torch.where(_wide(better), state["x"], state["best"])
        state["best_gradient"] = torch.where(_wide(better), gradient, state["best_gradient"])
        if step in due:
            gradient, begun = _settle(state, gradient, step - begun), step
        share = MOMENTUM if step else 1.0
        x, center = state["x"], search.center
        target = space.project(x + _wide(state["size"]) * space.steepest(gradient), center, epsilon)
        onward = space.project(x + share * (target - x) + (1 - share) * (x - state["before"]), center, epsilon)
        state["x"], state["before"] = onward, x


def checkpoints(steps: int) -> set[int]:
    """The steps at which step sizes are reconsidered: gaps that shrink from 22 % of all steps to 6 % (section 3.1)."""
    gap = share = 22  # in percent, so that sums stay exact
    found = set()
    while share <= 100:
        found.add(-(-share * steps // 100))
        gap = max(gap - 3, 6)
        share += gap
    return found


def _settle(state: dict[str, Tensor], gradient: Tensor, window: int) -> Tensor:
    """Halve the step of each sample that did not get on in the last `window` steps, and put it back on its best."""
    stuck = ~state["halved"] & (state["top"] <= state["top_then"])
    halve = (state["rises"] < RISING * window) | stuck
    state["size"] = torch.where(halve, state["size"] / 2, state["size"])
    state["x"] = torch.where(_wide(halve), state["best"], state["x"])
    state["halved"], state["top_then"], state["rises"] = halve, state["top"], torch.zeros_like(state["rises"])
    return torch.where(_wide(halve), state["best_gradient"], gradient)


def _wide(values: Tensor) -> Tensor:
    return values[:, None, None, None]
