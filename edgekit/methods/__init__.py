"""Training objectives, one file each.

A method takes (student, teacher, images, labels, inner=…, seeds=…) and its own options, and returns the loss of each
sample (N,); the student is in train mode before and after. The teacher, where there is none, is None.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from edgekit.methods.rslad import rslad
from edgekit.methods.sat import sat
from edgekit.methods.trades import trades


@dataclass(frozen=True)
class Method:
    """loss: the function; options: the keys of a recipe's [method] that it takes; needs_teacher: whether it distils."""

    loss: Callable[..., Tensor]
    options: tuple[str, ...]
    needs_teacher: bool
    paper: str


METHODS: dict[str, Method] = {
    "rslad": Method(rslad, ("robust_weight", "scale"), True, "Zi et al., ICCV 2021, arXiv:2108.07969"),
    "trades": Method(trades, ("beta",), False, "Zhang et al., ICML 2019, arXiv:1901.08573"),
    "sat": Method(sat, (), False, "Madry et al., ICLR 2018, arXiv:1706.06083"),
}
