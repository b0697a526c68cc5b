"""NES against the true gradient, against its budget, and against a judge without gradients."""

import pytest
import torch
from torch import Tensor

from edgekit.attacks.nes import nes
from edgekit.attacks.pgd import pgd
from edgekit.classifier import Wrapped
from edgekit.randomness import derive

torch.set_num_threads(1)
SEEDS = derive(0, 0, samples=torch.arange(297))


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_on_few_pixels_it_walks_as_the_true_gradient_does(norm: str) -> None:
    weight, generator = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0, 0.7]).view(1, 2, 3), torch.Generator().manual_seed(3)
    images = 0.3 + 0.4 * torch.rand(200, 1, 2, 3, generator=generator)

    def answer(batch: Tensor) -> Tensor:
        score = (batch * weight).flatten(1).sum(1) - 0.6
        return torch.stack([score, -score], 1)

    judge = Wrapped(answer, differentiable=False)
    labels = judge(images).argmax(1)
    dual = weight.abs().sum() if norm == "Linf" else weight.square().sum().sqrt()
    distance, epsilon = judge(images)[:, 0].abs() / dual, 0.1
    adversarial, fooled = nes(judge, judge, images, labels, seeds=SEEDS[:200], epsilon=epsilon, queries=400, norm=norm)
    assert not (fooled & (distance > epsilon + 1e-6)).any()  # out of reach
    assert fooled[distance < 0.95 * epsilon].float().mean() > 0.97
    assert 20 < fooled.sum() < 180
    length = torch.linalg.vector_norm(adversarial - images, ord=float("inf") if norm == "Linf" else 2, dim=(1, 2, 3))
    assert length.max() <= epsilon + 1e-6


@pytest.mark.parametrize("queries", [1, 2, 7, 8, 9, 10, 100])
def test_its_budget_is_kept(net, digits, queries: int) -> None:
    images, labels = digits[2][:20], digits[3][:20]
    asked: list[int] = []
    judge = Wrapped(lambda batch: asked.append(len(batch)) or net(batch), differentiable=False)
    nes(net, judge, images, labels, seeds=SEEDS[:20], epsilon=0.001, queries=queries)
    assert queries - 1 <= len(asked) - 1 <= queries  # the clean images first
    assert asked == sorted(asked, reverse=True)


def test_it_sees_through_scores_that_hide_their_gradient(net, digits) -> None:
    images, labels = digits[2:]
    masked = Wrapped(lambda batch: (net(batch) * 4).round() / 4 + 0 * batch.sum(), differentiable=True)
    blind = pgd(masked, masked, images, labels, seeds=SEEDS, epsilon=0.1)[1]
    adversarial, fooled = nes(masked, masked, images, labels, seeds=SEEDS, epsilon=0.1, queries=200)
    assert fooled.sum() > blind.sum() + 40
    assert masked(adversarial).argmax(1).ne(labels).equal(fooled)


def test_what_happens_to_a_sample_does_not_depend_on_its_neighbours(net, digits) -> None:
    images, labels = digits[2][:60], digits[3][:60]
    together = nes(net, net, images, labels, seeds=SEEDS[:60], epsilon=0.08, queries=60)[1]
    order = torch.randperm(60, generator=torch.Generator().manual_seed(2))
    shuffled = nes(net, net, images[order], labels[order], seeds=SEEDS[order], epsilon=0.08, queries=60)[1]
    assert 5 < together.sum() < 55
    assert (shuffled != together[order]).sum() <= 1
