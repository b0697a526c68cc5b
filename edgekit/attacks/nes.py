"""Natural evolution strategies: Ilyas et al., ICML 2018, arXiv:1804.08598; what all attacks promise: search.py.

The gradient of the judge's own margin is estimated from answers to antithetic Gaussian pairs, so neither a source nor
a twin is needed. Other than in the paper every probe lies in the ball, so that a probe which fools has fooled, and the
noise is coarse (the tiles of Ilyas et al., ICLR 2019, arXiv:1807.07978): in fewer directions fewer queries tell more.
"""

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from edgekit.attacks.losses import margin
from edgekit.attacks.norms import NORMS
from edgekit.attacks.search import Search
from edgekit.classifier import Classifier
from edgekit.errors import choose
from edgekit.randomness import derive, normal

PAIRS = 4  # of one estimate; with the iterate itself 9 queries a step
TILES = 8  # of one value each, along a side of the image
MOMENTUM = 0.9
REACH = 1.0  # length of a probe, as a share of the radius: files with an int8 input do not feel less than 1/255


def nes(
    source: Classifier,
    judge: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    seeds: Tensor | None,
    epsilon: float = 8 / 255,
    queries: int = 500,
    norm: str = "Linf",
) -> tuple[Tensor, Tensor]:
    """Steps of epsilon / 4 from the clean image along gradients that are estimated, not computed.

    Args:
        source: unused, all attacks take one.
        seeds: all that sample i tries is drawn from seeds[i]. None draws from 0.
        queries: candidates of each sample that are judged at most, after the clean image; at least 1.

    Raises:
        EdgekitError: `norm` is not in NORMS.
    """
    seeds = torch.zeros_like(labels) if seeds is None else seeds
    space, search = choose(NORMS, norm, "norm"), Search(judge, images, labels)

    def ask(candidate: Tensor, *carried: Tensor) -> tuple[Tensor, ...]:
        """The margin of the candidates that did not fool, and what belongs to these of `carried`."""
        truth = labels[search.active]
        logits, hit = search.show(candidate)
        return margin(logits, truth)[~hit], *(part[~hit] for part in carried)

    x, spent, size = search.center, 0, images.shape[2:]
    slope = torch.zeros_like(x)
    while spent < queries and not search.over:
        slope = MOMENTUM * slope
        for pair in range(min(PAIRS, (queries - spent) // 2)):
            tiles = x[:, :, :TILES, :TILES]
            drawn = normal(derive(spent, pair, samples=seeds[search.active.to(seeds.device)]), tiles)
            drawn = interpolate(drawn, size, mode="nearest")
            probe = REACH * epsilon / space.length(drawn)[:, None, None, None] * drawn
            up, down = (space.project(x + side * probe, search.center, epsilon) for side in (1, -1))
            above, x, up, down, slope = ask(up, x, up, down, slope)
            below, x, up, down, slope, above = ask(down, x, up, down, slope, above)
            # Weighed by what was really moved: at the border the projection holds one of the two back.
            slope = slope + (above - below)[:, None, None, None] * (up - down)
        x = space.project(x + epsilon / 4 * space.steepest(slope), search.center, epsilon)
        spent += 2 * PAIRS
        if spent < queries and not search.over:
            _, x, slope = ask(x, x, slope)
            spent += 1
    return search.result
