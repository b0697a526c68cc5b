"""The fast gradient sign method: Goodfellow, Shlens and Szegedy, ICLR 2015, arXiv:1412.6572."""

from torch import Tensor

from edgekit.attacks.losses import LOSSES
from edgekit.attacks.norms import NORMS, slope
from edgekit.attacks.search import Search
from edgekit.classifier import Classifier
from edgekit.errors import choose

_SLOPING = {name: loss for name, loss in LOSSES.items() if name != "kl"}


def fgsm(
    source: Classifier,
    judge: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    seeds: Tensor | None,
    epsilon: float = 8 / 255,
    loss: str = "ce",
    norm: str = "Linf",
) -> tuple[Tensor, Tensor]:
    """One step of length `epsilon` from the clean image along the sign of `source`'s gradient (under L2: along it).

    Args:
        seeds: unused, all attacks take them: this one draws nothing.
        loss: what is climbed, a key of LOSSES but "kl", whose slope at the clean image is 0.

    Raises:
        EdgekitError: `loss` is not in LOSSES, or `norm` not in NORMS.
    """
    objective, space = choose(_SLOPING, loss, "loss"), choose(NORMS, norm, "norm")
    search = Search(judge, images, labels)
    if not search.over:
        x = search.center.clone().requires_grad_()
        gradient = slope(objective(source(x), labels[search.active]), x)
        search.show(space.project(x.detach() + epsilon * space.steepest(gradient), search.center, epsilon))
    return search.result
