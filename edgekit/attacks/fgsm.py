"""The fast gradient sign method: Goodfellow, Shlens and Szegedy, ICLR 2015, arXiv:1412.6572."""

import torch
from torch import Tensor

from edgekit.attacks.losses import LOSSES
from edgekit.attacks.pgd import ascent, ball
from edgekit.classifier import Classifier
from edgekit.errors import choose


def fgsm(
    source: Classifier,
    judge: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    seeds: Tensor | None,
    epsilon: float = 8 / 255,
    loss: str = "ce",
) -> tuple[Tensor, Tensor]:
    """One step of length `epsilon` from the clean image along the sign of `source`'s gradient.

    Args:
        source: differentiable Classifier in eval mode; its gradients are followed.
        judge: Classifier to fool; it sees the clean image and the result.
        images: (N, C, H, W) float32 in [0, 1].
        labels: (N,) int64, the true classes.
        seeds: unused, all attacks take them: this one draws nothing.
        epsilon: length of the step, in units of the [0, 1] range.
        loss: what is climbed, a key of LOSSES.

    Returns:
        adversarial (N, C, H, W): the clean image where that is wrong already, else the result of the step.
        fooled (N,) bool: whether `judge` errs on it.

    Raises:
        EdgekitError: `loss` is not in LOSSES.
    """
    objective = choose(LOSSES, loss, "loss")
    with torch.no_grad():
        fooled = judge(images).argmax(1) != labels
    adversarial = images.clone()
    active = (~fooled).nonzero().squeeze(1)
    if not len(active):
        return adversarial, fooled
    x, truth = images[active].requires_grad_(), labels[active]
    slope = ascent(objective(source(x), truth), x)
    low, high = ball(images[active], epsilon)
    adversarial[active] = x = (images[active] + epsilon * slope).clamp(low, high)
    with torch.no_grad():
        fooled[active] = judge(x).argmax(1) != truth
    return adversarial, fooled
