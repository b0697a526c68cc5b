"""Square attack: Andriushchenko et al., ECCV 2020, arXiv:1912.00049: algorithm 1, and 2 for L-infinity.

It needs no gradient and so no source: only the scores that the judge itself answers. Where it beats the gradient
attacks, these were blind. What L2 needs instead of algorithm 2 stands in square_l2.py.
"""

import torch
from torch import Tensor

from edgekit.attacks import square_l2
from edgekit.attacks.norms import NORMS
from edgekit.attacks.search import Search
from edgekit.attacks.square_l2 import signs
from edgekit.classifier import Classifier
from edgekit.errors import choose
from edgekit.randomness import derive, integers

SHARE = 0.8  # of the image that the first squares cover: AutoAttack's p for both norms
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
    norm: str = "Linf",
) -> tuple[Tensor, Tensor]:
    """Random search: squares of the perturbation are changed, and kept where the margin grows.

    Args:
        source: unused, all attacks take one.
        seeds: all that sample i tries is drawn from seeds[i]. None draws from 0.
        queries: candidates of each sample that are judged at most, after the clean image; at least 1.

    Raises:
        EdgekitError: `norm` is not in NORMS, or the images are too small for it.
    """
    seeds = torch.zeros_like(labels) if seeds is None else seeds
    space, search = choose(NORMS, norm, "norm"), Search(judge, images, labels)
    first, change = (stripes, repaint) if norm == "Linf" else (square_l2.windows, square_l2.move)
    for query in range(queries):
        if search.over:
            break
        drawn = derive(query, samples=seeds[search.active.to(seeds.device)])
        if query == 0:
            x = first(drawn, search.center, epsilon)
        else:
            size = side(query, queries, *images.shape[2:])
            x = change(drawn, search.adversarial[search.active], search.center, size, epsilon)
        search.show(space.project(x, search.center, epsilon))
    return search.result


def stripes(seeds: Tensor, center: Tensor, epsilon: float) -> Tensor:
    """The first candidates (M, C, H, W): vertical stripes one pixel wide, each epsilon up or down."""
    _, channels, _, width = center.shape
    return center + epsilon * signs(seeds, channels * width, center).view(-1, channels, 1, width)


def repaint(seeds: Tensor, best: Tensor, center: Tensor, size: int, epsilon: float) -> Tensor:
    """`best` (M, C, H, W) with one square of `size` pixels, all of a channel of it epsilon up or down from `center`."""
    channels, height, width = center.shape[1:]
    rows, columns = (torch.arange(length, device=center.device) for length in (height, width))
    place = integers(seeds, 2, 1 << 20).to(center.device)
    top, left = place[:, :1] % (height - size + 1), place[:, 1:] % (width - size + 1)
    down = (rows >= top) & (rows < top + size)
    across = (columns >= left) & (columns < left + size)
    # Seeds of their own: the place must not foretell the signs.
    painted = center + epsilon * signs(derive(1, samples=seeds), channels, center).view(-1, channels, 1, 1)
    return torch.where((down[:, :, None] & across[:, None, :])[:, None], painted, best)


def side(query: int, queries: int, height: int, width: int) -> int:
    """Pixels along one side of the squares that candidate `query` of `queries` changes."""
    share = SHARE / 2 ** sum(10_000 * query / queries > bound for bound in HALVED)
    return min(max(1, round((share * height * width) ** 0.5)), height, width)
