"""Robust soft label adversarial distillation: Zi et al., ICCV 2021, arXiv:2108.07969, equations 7 and 8.

The teacher sees the clean image only. Its soft labels weigh every divergence, in the inner and in the outer problem:
KL(teacher || student) in standard notation, at temperature 1, and no hard label anywhere.
"""

import torch
from torch import Tensor, nn

from edgekit.classifier import Classifier
from edgekit.methods.inner import Inner, divergence


def rslad(
    student: nn.Module,
    teacher: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    inner: Inner,
    seeds: Tensor,
    robust_weight: float = 5 / 6,
    scale: float = 1.0,
) -> Tensor:
    """Loss of each sample (N,), a mean over classes; `labels` are unused, all methods take them.

    Args:
        robust_weight: share of the adversarial term, in [0, 1].
        scale: a factor on the whole; the public code uses 10 for the hundred classes of CIFAR-100.
    """
    with torch.no_grad():
        target = teacher(images).log_softmax(1)
    adversarial = inner(student, images, lambda logits: divergence(logits.log_softmax(1), target).sum(1), seeds)
    # Two passes, not one joined batch: batch normalization must not mix clean and adversarial statistics.
    robust, clean = (divergence(student(x).log_softmax(1), target).mean(1) for x in (adversarial, images))
    return scale * (robust_weight * robust + (1 - robust_weight) * clean)
