"""What Square draws under L2: Andriushchenko et al., ECCV 2020, arXiv:1912.00049, algorithm 3 and section 3.4.

The perturbation keeps its length: what one window gains is taken from another, and from what clipping left unused.
"""

import functools

import torch
from torch import Tensor

from edgekit.errors import EdgekitError
from edgekit.randomness import derive, integers

LEAST = 3  # pixels along the side of a window: it has two halves and a middle
ACROSS = 5  # windows along a side of the first candidate


def signs(seeds: Tensor, count: int, like: Tensor) -> Tensor:
    """(N, count) of -1 and 1, of the type and on the device of `like`."""
    return (2 * integers(seeds, count, 2) - 1).to(like)


@functools.cache
def window(size: int) -> Tensor:
    """The paper's eta (size, size), of length 1: a hill in the upper half, a pit in the lower one."""

    def hill(height: int) -> Tensor:
        rows, columns = (torch.arange(length, dtype=torch.float64) - length // 2 for length in (height, size))
        ring = torch.maximum(rows.abs()[:, None], columns.abs()[None]).long()  # 0 in the middle
        steps = 1 / torch.arange(1, max(height, size) // 2 + 2, dtype=torch.float64).square()
        terraces = steps.flip(0).cumsum(0).flip(0)[ring]  # each ring lies one step below the one inside
        return terraces / terraces.norm()

    return torch.cat([hill(size // 2), -hill(size - size // 2)]).float() / 2**0.5


def windows(seeds: Tensor, center: Tensor, epsilon: float) -> Tensor:
    """The first candidates (M, C, H, W): windows side by side over the whole image, each with a sign of its own.

    Raises:
        EdgekitError: the images have fewer than three pixels along a side.
    """
    channels, height, width = center.shape[1:]
    if min(height, width) < LEAST:
        raise EdgekitError("Square needs images of at least 3 x 3 pixels under L2", mend="Use another attack")
    size = max(LEAST, min(height, width) // ACROSS)
    down, across = height // size, width // size
    side_by_side = window(size).to(center).repeat(down, across)
    drawn = signs(seeds, channels * down * across, center).view(-1, channels, down, across)
    drawn = drawn.repeat_interleave(size, 2).repeat_interleave(size, 3)
    pattern = torch.zeros_like(center)
    top, left = (height - down * size) // 2, (width - across * size) // 2
    pattern[:, :, top : top + down * size, left : left + across * size] = side_by_side * drawn
    return center + epsilon * pattern / pattern.flatten(1).norm(dim=1)[:, None, None, None]


def move(seeds: Tensor, best: Tensor, center: Tensor, size: int, epsilon: float) -> Tensor:
    """`best` (M, C, H, W) with the perturbation of one window emptied and all its length put into another."""
    channels, height, width = center.shape[1:]
    size = min(max(size, LEAST) | 1, height - 1 + height % 2, width - 1 + width % 2)  # odd, within the image
    place = integers(seeds, 5, 1 << 20).to(center.device)
    gain, lose = (_pixels(place[:, 2 * k : 2 * k + 2], size, channels, height, width) for k in (0, 1))
    moved = (best - center).flatten(2)
    unused = (epsilon**2 - moved.square().sum((1, 2))).clamp(min=0)
    in_either = torch.zeros_like(moved).scatter(2, gain, 1.0).scatter(2, lose, 1.0)
    available = ((moved * in_either).square().sum(2) + unused[:, None] / channels).sqrt()[:, :, None]
    eta = window(size).to(center)
    eta = torch.where(place[:, 4, None, None] % 2 == 0, eta, eta.T).flatten(1)[:, None]
    old = moved.gather(2, gain)
    new = eta * signs(derive(1, samples=seeds), channels, center)[:, :, None] + _unit(old)
    moved = moved.scatter(2, lose, 0.0).scatter(2, gain, _unit(new) * available)
    return center + moved.view_as(center)


def _pixels(place: Tensor, size: int, channels: int, height: int, width: int) -> Tensor:
    """Places (M, C, size * size) in a flat image of the pixels of one window, which `place` (M, 2) draws."""
    span = torch.arange(size, device=place.device)
    rows, columns = place[:, :1] % (height - size + 1) + span, place[:, 1:] % (width - size + 1) + span
    flat = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)
    return flat[:, None].expand(-1, channels, -1)


def _unit(windows: Tensor) -> Tensor:
    return windows / windows.norm(dim=2, keepdim=True).clamp(min=1e-12)
