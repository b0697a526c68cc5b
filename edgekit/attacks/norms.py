"""The balls that attacks search: L-infinity and L2, always within the pixel range [0, 1]."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from edgekit.randomness import derive, normal, uniform

_RADIUS = 1  # the purpose for which `derive` draws a length, apart from the direction


@dataclass(frozen=True)
class Norm:
    """One norm; images, gradients and perturbations are (N, C, H, W), `epsilon` is the radius.

    Attributes:
        length: perturbation -> its norm (N,).
        steepest: gradient -> the direction of length 1 in which a linear function rises most; 0 where the gradient is
            0 or is not a number.
        project: (x, images, epsilon) -> a point of both the ball around `images` and the pixel range.
        start: (seeds, images, epsilon) -> a point drawn uniformly from the ball, the pixel range disregarded.
    """

    length: Callable[[Tensor], Tensor]
    steepest: Callable[[Tensor], Tensor]
    project: Callable[[Tensor, Tensor, float], Tensor]
    start: Callable[[Tensor, Tensor, float], Tensor]


def slope(value: Tensor, x: Tensor) -> Tensor:
    """Gradient of `value` (N,) by `x` (N, C, H, W)."""
    # Summed, not averaged: what a sample does must not depend on how many others share its batch.
    return torch.autograd.grad(value.sum(), x)[0]


def _box(x: Tensor, images: Tensor, epsilon: float) -> Tensor:
    return x.clamp((images - epsilon).clamp(min=0), (images + epsilon).clamp(max=1))


def _unit(gradient: Tensor) -> Tensor:
    gradient = gradient.nan_to_num(0, 0, 0)
    # Divided by the largest first: squares of small numbers vanish in float32.
    largest = gradient.abs().amax((1, 2, 3), keepdim=True)
    scaled = torch.where(largest > 0, gradient / largest, 0)
    return scaled / _euclidean(scaled).clamp(min=1)[:, None, None, None]


def _euclidean(perturbation: Tensor) -> Tensor:
    return perturbation.flatten(1).norm(dim=1)


def _sphere(x: Tensor, images: Tensor, epsilon: float) -> Tensor:
    """Shrunk towards the image, then cut to the pixel range, which holds the image: nothing moves away from it."""
    away = x - images
    share = (epsilon / _euclidean(away).clamp(min=1e-12)).clamp(max=1)
    return (images + share[:, None, None, None] * away).clamp(0, 1)


def _within(seeds: Tensor, images: Tensor, epsilon: float) -> Tensor:
    dimension = images[0].numel() if len(images) else 1
    share = uniform(derive(_RADIUS, samples=seeds), images[:, :1, :1, :1], 0, 1) ** (1 / dimension)
    return images + epsilon * share * _unit(normal(seeds, images))


NORMS: dict[str, Norm] = {
    "Linf": Norm(
        length=lambda perturbation: perturbation.flatten(1).abs().amax(1),
        steepest=torch.sign,
        project=_box,
        start=lambda seeds, images, epsilon: images + uniform(seeds, images, -epsilon, epsilon),
    ),
    "L2": Norm(length=_euclidean, steepest=_unit, project=_sphere, start=_within),
}
