"""FAB-T, the targeted Fast Adaptive Boundary attack: Croce and Hein, ICML 2020, arXiv:1907.02044.

It walks along the border between two classes towards the clean image and has no step size; of the radius it only asks
whether a candidate lies inside. Under L-infinity and L2; what all attacks promise: search.py.
"""

import torch
from torch import Tensor

from edgekit.attacks.norms import NORMS, Norm, slope
from edgekit.attacks.search import Search
from edgekit.attacks.targets import likeliest
from edgekit.classifier import Classifier
from edgekit.errors import choose

BIAS = 0.1  # alpha_max: the largest share of the projection of the clean image
OVERSHOOT = 1.05  # eta: both projections are left behind by so much
RETREAT = 0.9  # beta: how much of the perturbation stays once the border is passed outside the ball


def fab(
    source: Classifier,
    judge: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    seeds: Tensor | None,
    epsilon: float = 8 / 255,
    steps: int = 100,
    targets: int = 9,
    norm: str = "Linf",
) -> tuple[Tensor, Tensor]:
    """Look for the nearest point of each target class; the judge sees each iterate, drawn into the ball if need be.

    Args:
        seeds: unused: every target starts at the clean image, as the first start of the public code does.
        steps: number of steps for each target, at least 1.
        targets: how many wrong classes, from the one that `source` finds likeliest on the clean image downwards; all
            where there are no more.

    Raises:
        EdgekitError: `norm` is not in NORMS.
    """
    space, search = choose(NORMS, norm, "norm"), Search(judge, images, labels)
    for target in likeliest(source, images, labels, targets):
        pairs, x = torch.stack([labels, target], 1), search.center
        for _ in range(steps):
            if search.over:
                break
            x, center = x.detach().requires_grad_(), search.center
            true, wanted = source(x).gather(1, pairs[search.active]).unbind(1)
            weight = slope(wanted - true, x).nan_to_num(0, 0, 0)
            x, gap = x.detach(), (true - wanted).detach()
            own = onto_plane(x, weight, gap, norm)
            clean = onto_plane(center, weight, gap + (weight * (x - center)).flatten(1).sum(1), norm)
            near, far = (space.length(move).clamp(min=1e-8) for move in (own, clean))
            share = (near / (near + far)).clamp(max=BIAS)[:, None, None, None]
            x = ((1 - share) * (x + OVERSHOOT * own) + share * (center + OVERSHOOT * clean)).clamp(0, 1)
            _, hit = search.show(space.project(x, center, epsilon))
            x = _retreat(x[~hit], search.center, source, labels[search.active], space, epsilon)
    return search.result


def _retreat(x: Tensor, center: Tensor, source: Classifier, labels: Tensor, space: Norm, epsilon: float) -> Tensor:
    """Where the candidate fools `source`, but from outside the ball, take it nearer to the clean image."""
    outside = space.length(x - center) > epsilon
    if not outside.any():
        return x
    with torch.no_grad():
        passed = outside & (source(x).argmax(1) != labels)
    return torch.where(passed[:, None, None, None], center + RETREAT * (x - center), x)


def onto_plane(x: Tensor, weight: Tensor, gap: Tensor, norm: str) -> Tensor:
    """The shortest move (N, C, H, W) from `x` with <weight, move> = gap (N,) that stays in [0, 1].

    Where no such move exists, the one that comes nearest to the plane.
    """
    largest = weight.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-30)
    slant = (weight / largest * gap.sign()[:, None, None, None]).flatten(1)  # of size 1: squares do not vanish
    room = torch.where(slant > 0, 1 - x.flatten(1), torch.where(slant < 0, x.flatten(1), 0)).clamp(min=0)
    # Every pixel moves by its speed, times a level that all share, until the range stops it.
    speed = slant.sign() if norm == "Linf" else slant
    last = torch.where(slant == 0, 0, room / speed.abs().clamp(min=1e-30))
    level = _level((slant * speed).abs(), last, gap.abs() / largest.flatten())
    return (speed * torch.minimum(level[:, None], last)).view_as(x)


def _level(gain: Tensor, last: Tensor, wanted: Tensor) -> Tensor:
    """The least level (N,) at which sum_i gain_i * min(level, last_i) = wanted (N,); the highest `last` if none is."""
    last, order = last.sort(1)
    gain = gain.gather(1, order)
    stopped = torch.cumsum(gain * last, 1)
    moving = gain.flip(1).cumsum(1).flip(1)  # what this pixel and all that stop later gain
    begun = stopped - gain * last
    reached = begun + moving * last
    place = torch.searchsorted(reached, wanted[:, None]).clamp(max=last.shape[1] - 1)
    level = (wanted[:, None] - begun.gather(1, place)) / moving.gather(1, place).clamp(min=1e-30)
    return torch.minimum(level, last.gather(1, place)).squeeze(1)
