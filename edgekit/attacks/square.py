"""Square attack: Andriushchenko et al., ECCV 2020, arXiv:1912.00049, algorithms 1 and 2 under L-infinity.

It needs no gradient and so no source: only the scores that the judge itself answers. Where it beats the gradient
attacks, these were blind.
"""

import torch
from torch import Tensor

from edgekit.attacks.search import Search
from edgekit.classifier import Classifier
from edgekit.randomness import derive, integers

SHARE = 0.8  # of the image that the first squares cover: the paper's p for L-infinity
# After how many of 10,000 queries the share is halved (the public code's schedule; other budgets are scaled to it).
HALVED = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


def square(
    source: Classifier,
    judge: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    seeds: Tensor | None,
    epsilon: float = 8 / 255,
    queries: int = 1000,
) -> tuple[Tensor, Tensor]:
    """Random search: squares of the perturbation are set to +epsilon or -epsilon, and kept where the margin grows.

    Args:
        source: unused, all attacks take one.
        seeds: all that sample i tries is drawn from seeds[i]. None draws from 0.
        queries: candidates of each sample that are judged at most, after the clean image; at least 1.
    """
    seeds = torch.zeros_like(labels) if seeds is None else seeds
    _, channels, height, width = images.shape
    search = Search(judge, images, labels)
    rows, columns = (torch.arange(size, device=images.device) for size in (height, width))
    for query in range(queries):
        if search.over:
            break
        drawn = derive(query, samples=seeds[search.active.to(seeds.device)])
        low, high = (search.center - epsilon).clamp(min=0), (search.center + epsilon).clamp(max=1)
        if query == 0:  # vertical stripes one pixel wide: the paper's start
            up = _signs(drawn, channels * width, images.device).view(-1, channels, 1, width)
            x = torch.where(up, high, low)
        else:
            size = side(query, queries, height, width)
            place = integers(drawn, 2, 1 << 20).to(images.device)
            top, left = place[:, :1] % (height - size + 1), place[:, 1:] % (width - size + 1)
            down = (rows >= top) & (rows < top + size)
            across = (columns >= left) & (columns < left + size)
            inside = (down[:, :, None] & across[:, None, :])[:, None]
            # Seeds of their own: the place must not foretell the signs.
            up = _signs(derive(query, 1, samples=drawn), channels, images.device).view(-1, channels, 1, 1)
            x = torch.where(inside, torch.where(up, high, low), search.adversarial[search.active])
        search.show(x)
    return search.result


def side(query: int, queries: int, height: int, width: int) -> int:
    """Pixels along one side of the squares that candidate `query` of `queries` changes."""
    share = SHARE / 2 ** sum(10_000 * query / queries > bound for bound in HALVED)
    return min(max(1, round((share * height * width) ** 0.5)), height, width)


def _signs(seeds: Tensor, count: int, device: torch.device) -> Tensor:
    return (integers(seeds, count, 2) == 1).to(device)
