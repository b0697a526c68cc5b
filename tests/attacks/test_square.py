"""Square against brute force, against its own budget, and against a judge whose gradients say nothing."""

import itertools

import pytest
import torch
from torch import Tensor

from edgekit.attacks.pgd import pgd
from edgekit.attacks.square import side, square
from edgekit.classifier import Wrapped
from edgekit.randomness import derive

torch.set_num_threads(1)
SEEDS = derive(0, 0, samples=torch.arange(297))


def recorder(judge) -> tuple[Wrapped, list[Tensor]]:
    seen: list[Tensor] = []

    def ask(batch: Tensor) -> Tensor:
        seen.append(batch.clone())
        return judge(batch)

    return Wrapped(ask, differentiable=False), seen


def test_the_squares_shrink_as_the_public_code_says() -> None:
    # 32 x 32 pixels, 10,000 queries: the square root of 0.8 / 2^k of 1,024 pixels.
    assert [side(query, 10_000, 32, 32) for query in (1, 10, 11, 51, 201, 501, 1001)] == [29, 29, 20, 14, 10, 7, 5]
    assert [side(query, 10_000, 32, 32) for query in (2001, 4001, 6001, 8001)] == [4, 3, 2, 1]
    assert side(201, 10_000, 32, 32) == side(21, 1000, 32, 32)
    assert side(1, 100, 3, 40) == 3


def test_on_few_pixels_it_finds_what_all_corners_of_the_ball_hold() -> None:
    weight, generator = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0, 0.7]).view(1, 2, 3), torch.Generator().manual_seed(3)
    images, epsilon = torch.rand(120, 1, 2, 3, generator=generator), 0.15

    def answer(batch: Tensor) -> Tensor:
        score = (batch * weight).flatten(1).sum(1) - 0.6
        return torch.stack([score, -score], 1)

    judge = Wrapped(answer, differentiable=False)
    labels = judge(images).argmax(1)
    reachable = torch.zeros(120, dtype=torch.bool)
    for signs in itertools.product((-1.0, 1.0), repeat=6):
        reachable |= judge((images + epsilon * torch.tensor(signs).view(1, 2, 3)).clamp(0, 1)).argmax(1) != labels
    adversarial, fooled = square(judge, judge, images, labels, seeds=SEEDS[:120], epsilon=epsilon, queries=400)
    assert fooled.equal(reachable)
    assert 10 < fooled.sum() < 110
    assert (adversarial - images).abs().max() <= epsilon + 1e-6
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1


def test_its_budget_is_kept_and_what_is_fooled_is_asked_no_more(net, digits) -> None:
    images, labels = digits[2][:80], digits[3][:80]
    judge, seen = recorder(net)
    adversarial, fooled = square(net, judge, images, labels, seeds=SEEDS[:80], epsilon=0.1, queries=150)
    assert len(seen) == 151  # the clean images first
    counts = [len(batch) for batch in seen]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] >= (~fooled).sum()
    assert 5 < fooled.sum() < 75
    assert net(adversarial).argmax(1).ne(labels).equal(fooled)
    stripes = seen[1][0] - images[net(images).argmax(1) == labels][0]
    assert stripes.std(1).max() < 0.06  # one value a column, where the range of pixels does not cut it


@pytest.mark.parametrize("queries", [2, 60])
def test_more_queries_only_add(net, digits, queries: int) -> None:
    images, labels = digits[2][:60], digits[3][:60]
    margins = []
    for budget in (1, queries):
        adversarial, _ = square(net, net, images, labels, seeds=SEEDS[:60], epsilon=0.05, queries=budget)
        logits = net(adversarial)
        others = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
        margins.append(others - logits.gather(1, labels[:, None])[:, 0])
    right = net(images).argmax(1) == labels
    assert (margins[1] >= margins[0] - 1e-5)[right & (margins[0] < 0)].all()


def test_what_happens_to_a_sample_does_not_depend_on_its_neighbours(net, digits) -> None:
    images, labels = digits[2][:60], digits[3][:60]
    together = square(net, net, images, labels, seeds=SEEDS[:60], epsilon=0.08, queries=40)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(2))
    shuffled = square(net, net, images[order], labels[order], seeds=SEEDS[order], epsilon=0.08, queries=40)
    assert (shuffled[1] != together[1][order]).sum() <= 1  # a last bit may decide between two candidates
    assert not square(net, net, images, labels, seeds=SEEDS[60:120], epsilon=0.08, queries=40)[0].equal(together[0])


def test_it_sees_through_scores_that_hide_their_gradient(net, digits) -> None:
    """Rounded logits have a gradient of zero nearly everywhere: PGD stands still, Square does not."""
    images, labels = digits[2], digits[3]
    masked = Wrapped(lambda batch: (net(batch) * 4).round() / 4 + 0 * batch.sum(), differentiable=True)
    _, blind = pgd(masked, masked, images, labels, seeds=SEEDS, epsilon=0.1)
    _, fooled = square(masked, masked, images, labels, seeds=SEEDS, epsilon=0.1, queries=200)
    assert fooled.sum() > blind.sum() + 40
