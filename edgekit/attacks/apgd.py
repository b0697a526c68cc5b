"""Auto-PGD: Croce and Hein, ICML 2020, arXiv:2003.01690, algorithm 1 under L-infinity."""

import torch
from torch import Tensor

from edgekit.attacks.losses import LOSSES
from edgekit.attacks.pgd import ascent, ball
from edgekit.classifier import Classifier
from edgekit.errors import choose
from edgekit.randomness import uniform

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
) -> tuple[Tensor, Tensor]:
    """Search the epsilon ball with momentum and a step size that each sample halves for itself.

    The first step has twice the radius as its length. At each checkpoint a sample whose loss did not rise often enough
    goes on from the best point that it has seen, with half of its step.

    Args:
        source: differentiable Classifier in eval mode; its gradients and the losses that it sees steer.
        judge: Classifier to fool. It sees the clean image and every iterate; where it is `source` itself, one forward
            pass answers and gives the gradient.
        images: (N, C, H, W) float32 in [0, 1].
        labels: (N,) int64, the true classes.
        seeds: (N,) int64; sample i starts where seeds[i] says, whatever batch it sits in. None starts at the image.
        epsilon: radius of the ball, in units of the [0, 1] range.
        steps: number of steps, at least 1.
        loss: what is climbed, a key of LOSSES.

    Returns:
        adversarial (N, C, H, W): the clean image where that is wrong already, else the first iterate that fooled,
            else the one of highest loss on the judge.
        fooled (N,) bool: whether `judge` errs on it.

    Raises:
        EdgekitError: `loss` is not in LOSSES, or is not defined for so few classes.
    """
    objective = choose(LOSSES, loss, "loss")
    with torch.no_grad():
        fooled = judge(images).argmax(1) != labels
    adversarial, highest = images.clone(), images.new_full(labels.shape, -torch.inf)
    active = (~fooled).nonzero().squeeze(1)
    low, high = (bound[active] for bound in ball(images, epsilon))
    start = images if seeds is None else images + uniform(seeds, images, -epsilon, epsilon)
    x = start[active].clamp(low, high)
    never = x.new_full(active.shape, -torch.inf)
    # What each sample that is not fooled yet carries from step to step.
    state = {
        "active": active,
        "low": low,
        "high": high,
        "x": x,
        "before": x,
        "best": x,
        "best_slope": torch.zeros_like(x),
        "value": never,  # of the last iterate, on the source
        "top": never,  # of the best one
        "top_then": never,  # the same at the last checkpoint
        "rises": torch.zeros_like(active),
        "size": torch.full_like(never, 2 * epsilon),
        "halved": torch.ones_like(active, dtype=torch.bool),  # no comparison with a checkpoint that was not
    }
    due, begun = checkpoints(steps), 0
    for step in range(steps + 1):
        if not len(state["active"]):
            break
        truth, x = labels[state["active"]], state["x"].detach()  # a view, of which alone gradients are asked
        shared = source is judge and step < steps
        with torch.set_grad_enabled(shared):
            logits = judge(x.requires_grad_(shared))
            seen = objective(logits, truth)
        hit = logits.argmax(1) != truth
        slope = ascent(seen, x) if shared and not hit.all() else torch.zeros_like(x)
        value, place = seen.detach(), state["active"]
        keep = hit | (value > highest[place])
        adversarial[place[keep]], highest[place[keep]] = state["x"][keep], value[keep]
        fooled[place[hit]] = True
        state, value, slope = {name: part[~hit] for name, part in state.items()}, value[~hit], slope[~hit]
        if step == steps or not len(state["active"]):
            break
        if not shared:
            x = state["x"].detach().requires_grad_()
            felt = objective(source(x), labels[state["active"]])
            value, slope = felt.detach(), ascent(felt, x)
        state["rises"] = state["rises"] + ((value > state["value"]) if step else 0)
        state["value"] = value
        better = value > state["top"]
        state["top"] = torch.where(better, value, state["top"])
        state["best"] = torch.where(_wide(better), state["x"], state["best"])
        state["best_slope"] = torch.where(_wide(better), slope, state["best_slope"])
        if step in due:
            slope, begun = _settle(state, slope, step - begun), step
        share = MOMENTUM if step else 1.0
        x, low, high = state["x"], state["low"], state["high"]
        target = (x + _wide(state["size"]) * slope).clamp(low, high)
        onward = (x + share * (target - x) + (1 - share) * (x - state["before"])).clamp(low, high)
        state["x"], state["before"] = onward, x
    return adversarial, fooled


def checkpoints(steps: int) -> set[int]:
    """The steps at which step sizes are reconsidered: gaps that shrink from 22 % of all steps to 6 % (section 3.1)."""
    gap = share = 22  # in percent, so that sums stay exact
    found = set()
    while share <= 100:
        found.add(-(-share * steps // 100))
        gap = max(gap - 3, 6)
        share += gap
    return found


def _settle(state: dict[str, Tensor], slope: Tensor, window: int) -> Tensor:
    """Halve the step of each sample that did not get on in the last `window` steps, and put it back on its best."""
    stuck = ~state["halved"] & (state["top"] <= state["top_then"])
    halve = (state["rises"] < RISING * window) | stuck
    state["size"] = torch.where(halve, state["size"] / 2, state["size"])
    state["x"] = torch.where(_wide(halve), state["best"], state["x"])
    state["halved"], state["top_then"], state["rises"] = halve, state["top"], torch.zeros_like(state["rises"])
    return torch.where(_wide(halve), state["best_slope"], slope)


def _wide(values: Tensor) -> Tensor:
    return values[:, None, None, None]
