"""Standard adversarial training: Madry et al., ICLR 2018, arXiv:1706.06083, equation 2.1."""

from torch import Tensor, nn

from edgekit.attacks.losses import cross_entropy
from edgekit.methods.inner import Inner


def sat(student: nn.Module, teacher: None, images: Tensor, labels: Tensor, *, inner: Inner, seeds: Tensor) -> Tensor:
    """Loss of each sample (N,): cross-entropy on the adversarial image, found from a uniform start in the ball."""
    adversarial = inner(student, images, lambda logits: cross_entropy(logits, labels), seeds, spread=True)
    return cross_entropy(student(adversarial), labels)
