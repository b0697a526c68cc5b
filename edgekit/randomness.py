"""Random numbers that belong to a sample: drawn from its seed alone, equal for any batch, worker, device or resume.

No global generator is read or moved. The generator is SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) used as a counter:
number k of seed s is mix(s + (k + 1) * gamma), in wrapping 64-bit integers, exact on every device.
"""

import math

import torch
from torch import Tensor

_GAMMA = -7046029254386353131  # 0x9E3779B97F4A7C15, the golden ratio in 64 bits, as a signed integer
_FIRST = -4658895280553007687  # 0xBF58476D1CE4E5B9
_SECOND = -7723592293110705685  # 0x94D049BB133111EB


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical shift right; torch's own is arithmetic and would smear the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _FIRST
    z = (z ^ _shift(z, 27)) * _SECOND
    return z ^ _shift(z, 31)


def derive(seed: int, *steps: int, samples: Tensor) -> Tensor:
    """Seeds (N,) int64 of `samples` (N,) int64 after `steps` (an epoch, a restart, a purpose), on the CPU."""
    state = _mix(torch.tensor(seed, dtype=torch.int64) + _GAMMA)  # mixed first: seed 1, step 0 is not seed 0, step 1
    for step in steps:
        state = _mix((state ^ step) + _GAMMA)
    return _mix((_mix(state + _GAMMA) ^ samples.cpu().to(torch.int64)) + _GAMMA)


def _unit(seeds: Tensor, count: int) -> Tensor:
    """(N, count) float32 in [0, 1): 24 bits each, so that every value is exact in float32."""
    counter = torch.arange(1, count + 1, dtype=torch.int64) * _GAMMA
    return _shift(_mix(seeds.cpu()[:, None] + counter), 40).to(torch.float32) * 2.0**-24


def uniform(seeds: Tensor, like: Tensor, low: float, high: float) -> Tensor:
    """A tensor shaped (N, …) as `like`, on its device: sample i uniform in [low, high), from seeds[i] alone."""
    numbers = _unit(seeds, like[0].numel()) if len(like) else torch.empty(0)
    return (low + (high - low) * numbers).reshape(like.shape).to(like.device)


def normal(seeds: Tensor, like: Tensor) -> Tensor:
    """A tensor shaped (N, …) as `like`, on its device: standard normal, by Box and Muller (1958)."""
    if not len(like):
        return torch.empty_like(like)
    count = like[0].numel()
    first, second = _unit(seeds, 2 * count).chunk(2, 1)
    return ((-2 * (1 - first).log()).sqrt() * (2 * math.pi * second).cos()).reshape(like.shape).to(like.device)


def integers(seeds: Tensor, count: int, high: int) -> Tensor:
    """(N, count) int64 in [0, high), on the CPU."""
    return (_unit(seeds, count) * high).to(torch.int64)
