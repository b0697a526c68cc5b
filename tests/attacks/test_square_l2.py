"""Square under L2: its window against the paper's sum of rectangles, its moves against what they must keep."""

import numpy as np
import pytest
import torch

from edgekit.attacks.pgd import pgd
from edgekit.attacks.square import square
from edgekit.attacks.square_l2 import move, window, windows
from edgekit.classifier import Wrapped
from edgekit.errors import EdgekitError
from edgekit.randomness import derive

torch.set_num_threads(1)
SEEDS = derive(0, 0, samples=torch.arange(297))


@pytest.mark.parametrize("size", [3, 5, 6, 11])
def test_the_window_is_the_papers(size: int) -> None:
    def hill(rows: int, columns: int) -> np.ndarray:  # equation 4: rectangles that grow, each lower than the last
        total = np.zeros((rows, columns))
        for m in range(max(rows, columns) // 2 + 1):
            top, left = rows // 2 - m, columns // 2 - m
            total[max(top, 0) : rows // 2 + m + 1, max(left, 0) : columns // 2 + m + 1] += 1 / (m + 1) ** 2
        return total / np.sqrt((total**2).sum())

    half = size // 2
    expected = np.vstack([hill(half, size), -hill(size - half, size)]) / np.sqrt(2)
    assert np.allclose(window(size).numpy(), expected, atol=1e-6)
    assert window(size).square().sum().item() == pytest.approx(1)


def test_a_move_fills_one_window_and_keeps_the_length() -> None:
    generator = torch.Generator().manual_seed(0)
    center, epsilon = torch.full((60, 3, 12, 10), 0.5), 0.8
    start = windows(SEEDS[:60], center, epsilon)
    assert torch.allclose((start - center).flatten(1).norm(dim=1), torch.full((60,), epsilon))
    best = center + 0.5 * (start - center) + 0.01 * torch.randn(center.shape, generator=generator)
    for size in (3, 4, 9, 40):
        moved = move(SEEDS[:60], best, center, size, epsilon)
        length = (moved - center).flatten(1).norm(dim=1)
        assert torch.allclose(length, torch.full((60,), epsilon), atol=1e-5)  # nothing was clipped: all is used
        side = min(size | 1, 9)
        touched = (moved != best).any(1).flatten(1).sum(1)
        assert (touched <= 2 * side * side).all()
        assert (touched >= side * side).all()
        emptied = ((moved == center) & (best != center)).all(1).flatten(1).any(1)
        assert emptied.float().mean() > 0.2  # where the two windows do not cover each other


def test_it_breaks_what_it_can_within_the_ball(net, digits) -> None:
    images, labels = digits[2][:100], digits[3][:100]
    arguments = {"seeds": SEEDS[:100], "epsilon": 1.0, "norm": "L2"}
    adversarial, fooled = square(net, net, images, labels, **arguments, queries=300)
    assert (adversarial - images).flatten(1).norm(dim=1).max() <= 1 + 1e-5
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    assert net(adversarial).argmax(1).ne(labels).equal(fooled)
    white = pgd(net, net, images, labels, **arguments, steps=20, loss="margin")[1]
    first = square(net, net, images, labels, **arguments, queries=1)[1]
    assert first.sum() + 15 < fooled.sum() <= white.sum() + 1
    assert fooled.sum() > 0.7 * white.sum()


def test_images_too_small_for_a_window_are_refused() -> None:
    judge, image = Wrapped(lambda batch: batch.flatten(1)[:, :2], differentiable=False), torch.rand(1, 1, 2, 9)
    with pytest.raises(EdgekitError, match="3 x 3"):
        square(judge, judge, image, judge(image).argmax(1), seeds=None, norm="L2")
