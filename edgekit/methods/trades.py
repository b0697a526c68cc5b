"""TRADES: Zhang et al., ICML 2019, arXiv:1901.08573, equation 5 with the KL divergence as its surrogate."""

import torch
from torch import Tensor, nn

from edgekit.attacks.losses import cross_entropy
from edgekit.methods.inner import Inner, divergence
from edgekit.models.fold import fold


def trades(
    student: nn.Module, teacher: None, images: Tensor, labels: Tensor, *, inner: Inner, seeds: Tensor, beta: float = 6.0
) -> Tensor:
    """Loss of each sample (N,): cross-entropy on the clean image + beta KL(clean || adversarial prediction)."""
    with torch.no_grad():
        anchor = fold(student.eval())(images).log_softmax(1)
    student.train()
    adversarial = inner(student, images, lambda logits: divergence(logits.log_softmax(1), anchor).sum(1), seeds)
    clean = student(images)
    # The gradient flows through both predictions, as in the paper.
    drift = divergence(student(adversarial).log_softmax(1), clean.log_softmax(1)).sum(1)
    return cross_entropy(clean, labels) + beta * drift
