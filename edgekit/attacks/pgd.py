"""Projected gradient descent under L-infinity: Madry et al., ICLR 2018, arXiv:1706.06083."""

import torch
from torch import Tensor

from edgekit.attacks.losses import LOSSES
from edgekit.classifier import Classifier
from edgekit.errors import choose
from edgekit.randomness import uniform


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
) -> tuple[Tensor, Tensor]:
    """Search the epsilon ball around each image for an input that fools `judge`.

    Args:
        source: differentiable Classifier in eval mode; its gradients are followed.
        judge: Classifier to fool. It sees the clean image, the start and what each step makes of it, until one of
            them fools it. Where it is `source` itself, one forward pass answers and gives the gradient.
        images: (N, C, H, W) float32 in [0, 1].
        labels: (N,) int64, the true classes.
        seeds: (N,) int64; sample i starts where seeds[i] says, whatever batch it sits in. None starts at the image.
        epsilon: radius of the ball, in units of the [0, 1] range.
        step_size: length of a step in the same units; epsilon / 4 where it is not given.
        steps: number of steps, at least 1.
        loss: what is climbed, a key of LOSSES.

    Returns:
        adversarial (N, C, H, W): the clean image where that is wrong already, else the first iterate that fooled,
            else the one of highest loss on the judge.
        fooled (N,) bool: whether `judge` errs on it.

    Raises:
        EdgekitError: `loss` is not in LOSSES.
    """
    objective = choose(LOSSES, loss, "loss")
    step_size = epsilon / 4 if step_size is None else step_size
    with torch.no_grad():
        fooled = judge(images).argmax(1) != labels
    adversarial, highest = images.clone(), torch.full(labels.shape, -torch.inf, device=images.device)
    active = (~fooled).nonzero().squeeze(1)
    low, high = (bound[active] for bound in ball(images, epsilon))
    start = images if seeds is None else images + uniform(seeds, images, -epsilon, epsilon)
    x = start[active].clamp(low, high)
    for step in range(steps + 1):
        if not len(active):
            break
        shared = source is judge and step < steps
        with torch.set_grad_enabled(shared):
            logits = judge(x.requires_grad_(shared))
            value = objective(logits, labels[active])
        hit = logits.argmax(1) != labels[active]
        # Taken before the fooled samples leave: the pass that judged them serves the others.
        slope = ascent(value, x)[~hit] if shared and not hit.all() else None
        x, value = x.detach(), value.detach()
        keep = hit | (value > highest[active])
        adversarial[active[keep]], highest[active[keep]] = x[keep], value[keep]
        fooled[active[hit]] = True
        x, active, low, high = (tensor[~hit] for tensor in (x, active, low, high))
        if step == steps or not len(active):
            break
        if slope is None:
            slope = ascent(objective(source(x.requires_grad_()), labels[active]), x)
        # The projection stays outside the graph: inside, it would zero the gradient of pixels at the border.
        x = (x.detach() + step_size * slope).clamp(low, high)
    return adversarial, fooled


def ball(images: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The lowest and the highest value of each pixel within `epsilon` of `images` and within [0, 1]."""
    return (images - epsilon).clamp(min=0), (images + epsilon).clamp(max=1)


def ascent(value: Tensor, x: Tensor) -> Tensor:
    """Sign of the gradient of `value` (N,) by `x`: -1, 0 or 1, and 0 where the gradient is not a number."""
    # Summed, not averaged: what a sample does must not depend on how many others share its batch.
    (gradient,) = torch.autograd.grad(value.sum(), x)
    return gradient.sign()
