"""A judge that sees only images which a camera or a decoder can deliver: uint8 values, inside the ball."""

import torch
from torch import Tensor

from edgekit.attacks.norms import NORMS
from edgekit.classifier import Classifier
from edgekit.errors import EdgekitError, choose

LEVELS = 255  # steps of a uint8 pixel over the [0, 1] range
_ROUNDING = 1e-4  # of a step: what float32 loses between value / 255 and value

# A nearest grid point of a point on an L2 sphere lies outside as often as not: shorter ones are tried before the last
# resort, every pixel rounded towards the clean one, which costs a large part of the perturbation.
_SHARES = (1.0, 0.99, 0.97, 0.93)


class Grid:
    """`judge` behind a camera. Search asks it, and keeps what `deliver` made of a candidate."""

    differentiable = False  # rounding has no gradient

    def __init__(self, judge: Classifier, epsilon: float, norm: str) -> None:
        self._judge, self._space = judge, choose(NORMS, norm, "norm")
        self._epsilon = epsilon

    def __call__(self, images: Tensor) -> Tensor:
        return self._judge(images)

    def deliver(self, x: Tensor, center: Tensor) -> Tensor:
        """The uint8 image, as float32 in [0, 1], nearest to each candidate (M, C, H, W) that lies in its ball."""
        # A ball around a grid point holds, in L-infinity, the grid points of the largest whole radius.
        whole = int(LEVELS * self._epsilon + _ROUNDING) / LEVELS
        radius = whole if self._space is NORMS["Linf"] else self._epsilon
        towards = (LEVELS * (x - center)).sign() * ((LEVELS * (x - center)).abs() + _ROUNDING).floor()
        delivered = snap(center + towards / LEVELS)
        for share in reversed(_SHARES):
            nearest = snap(self._space.project(x, center, share * radius))
            inside = self._space.length(nearest - center) <= radius + 1e-6
            delivered = torch.where(inside[:, None, None, None], nearest, delivered)
        return delivered


def snap(images: Tensor) -> Tensor:
    """The nearest uint8 values, as multiples of 1/255."""
    return (LEVELS * images).round() / LEVELS


def require(images: Tensor) -> None:
    """Refuse clean images that are on no grid themselves: the ball around them may hold no image that exists.

    Raises:
        EdgekitError: a pixel is no multiple of 1/255.
    """
    if (images - snap(images)).abs().max() > _ROUNDING / LEVELS:
        raise EdgekitError(
            "the clean images are not uint8 values, so the images around them cannot be either",
            mend="Leave out --grid, or give images in the size that the model takes",
        )
