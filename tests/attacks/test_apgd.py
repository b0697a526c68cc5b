"""Auto-PGD against a second one, written sample by sample from the paper, and against what PGD reaches."""

import copy

import pytest
import torch
from torch import Tensor, nn

from edgekit.attacks.apgd import _settle, apgd, checkpoints, targeted
from edgekit.attacks.losses import LOSSES
from edgekit.attacks.pgd import pgd
from edgekit.attacks.targets import likeliest
from edgekit.classifier import Wrapped
from edgekit.errors import EdgekitError
from edgekit.randomness import derive, uniform

torch.set_num_threads(1)
SEEDS = derive(0, 0, samples=torch.arange(297))


def one_by_one(net: nn.Module, image: Tensor, label: Tensor, start: Tensor, epsilon: float, steps: int, loss: str):
    """Algorithm 1 for one image (1, C, H, W): all its iterates, whether or not they fool."""

    def climb(x: Tensor) -> tuple[float, Tensor]:
        x = x.clone().requires_grad_()
        value = LOSSES[loss](net(x), label).sum()
        return value.item(), torch.autograd.grad(value, x)[0].sign()

    def project(x: Tensor) -> Tensor:
        return torch.max(torch.min(x, image + epsilon), image - epsilon).clamp(0, 1)

    size, x, iterates, values = 2 * epsilon, project(start), [project(start)], []
    best, best_value, best_sign, previous = x, -float("inf"), None, x
    marks, last_mark, size_stayed, best_then = [22, 41, 57, 70, 80, 87, 93, 99], 0, False, -float("inf")
    for k in range(steps):
        value, sign = climb(x)
        values.append(value)
        if value > best_value:
            best, best_value, best_sign = x, value, sign
        if k in marks:
            rises = sum(values[i] > values[i - 1] for i in range(last_mark + 1, k + 1))
            if rises < 0.75 * (k - last_mark) or (size_stayed and best_value <= best_then):
                size, x, sign, size_stayed = size / 2, best, best_sign, False
            else:
                size_stayed = True
            last_mark, best_then = k, best_value
        z = project(x + size * sign)
        a = 1 if k == 0 else 0.75
        x, previous = project(x + a * (z - x) + (1 - a) * (x - previous)), x
        iterates.append(x)
    return iterates


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr"])
@pytest.mark.parametrize("shared", [False, True])
def test_every_iterate_is_the_papers(net, digits, loss: str, shared: bool) -> None:
    count, epsilon, steps = 12, 0.03, 100  # so small a ball leaves samples unfooled, which take all steps
    # In float64: a last bit that a batch changes must not decide between two iterates.
    net, images = copy.deepcopy(net).double(), digits[2][:count].double()
    labels, seeds = digits[3][:count], SEEDS[:count]
    seen: list[Tensor] = []

    def recording(batch: Tensor) -> Tensor:
        seen.append(batch.detach().clone())
        return net(batch)

    judge = Wrapped(recording, differentiable=True)
    _, fooled = apgd(
        judge if shared else net, judge, images, labels, seeds=seeds, epsilon=epsilon, steps=steps, loss=loss
    )
    left = (~fooled).nonzero().squeeze(1)
    assert len(left) >= 4
    for i in left.tolist():
        start = images[i : i + 1] + uniform(seeds[i : i + 1], images[i : i + 1], -epsilon, epsilon)
        expected = one_by_one(net, images[i : i + 1], labels[i : i + 1], start, epsilon, steps, loss)
        for batch, iterate in zip(seen[1:], expected, strict=True):
            assert (batch - iterate).flatten(1).abs().amax(1).min() < 1e-9


def test_the_checkpoints_are_those_of_the_paper() -> None:
    assert checkpoints(100) == {22, 41, 57, 70, 80, 87, 93, 99}


def test_a_step_is_halved_where_too_few_steps_rose_or_nothing_better_came_with_a_step_that_had_stayed() -> None:
    best, here = torch.full((4, 1, 1, 1), 7.0), torch.zeros(4, 1, 1, 1)
    state = {
        "halved": torch.tensor([False, False, True, False]),
        "top": torch.tensor([2.0, 1.0, 1.0, 2.0]),
        "top_then": torch.tensor([1.0, 1.0, 1.0, 1.0]),
        "rises": torch.tensor([15, 16, 16, 14]),  # of 20 steps, of which 15 must have risen
        "size": torch.ones(4),
        "x": here,
        "best": best,
        "best_gradient": -torch.ones(4, 1, 1, 1),
    }
    slope = _settle(state, torch.ones(4, 1, 1, 1), 20)
    assert state["size"].tolist() == [1.0, 0.5, 1.0, 0.5]
    assert state["x"].flatten().tolist() == [0.0, 7.0, 0.0, 7.0]
    assert slope.flatten().tolist() == [1.0, -1.0, 1.0, -1.0]
    assert state["halved"].tolist() == [False, True, False, True]
    assert state["rises"].tolist() == [0, 0, 0, 0]


def test_it_is_at_least_as_strong_as_pgd_with_as_many_steps_and_stays_in_the_ball(net, digits) -> None:
    images, labels = digits[2:]
    for loss in ("ce", "margin"):
        _, theirs = pgd(net, net, images, labels, seeds=SEEDS, epsilon=0.06, steps=40, loss=loss)
        adversarial, fooled = apgd(net, net, images, labels, seeds=SEEDS, epsilon=0.06, steps=40, loss=loss)
        assert 30 < fooled.sum() < 267
        assert fooled.sum() >= theirs.sum() - 2
        assert net(adversarial).argmax(1).ne(labels).equal(fooled)
        assert (adversarial - images).abs().max() <= 0.06 + 1e-6
        assert adversarial.min() >= 0
        assert adversarial.max() <= 1


def test_what_happens_to_a_sample_does_not_depend_on_its_neighbours(net, digits) -> None:
    net, images, labels = copy.deepcopy(net).double(), digits[2][:60].double(), digits[3][:60]
    together = apgd(net, net, images, labels, seeds=SEEDS[:60], epsilon=0.05, steps=20)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(2))
    shuffled = apgd(net, net, images[order], labels[order], seeds=SEEDS[order], epsilon=0.05, steps=20)
    assert 0 < together[1].sum() < 60
    assert shuffled[1].equal(together[1][order])
    assert shuffled[0].allclose(together[0][order], atol=1e-9)


def test_dlr_needs_three_classes() -> None:
    two = Wrapped(lambda batch: batch.flatten(1)[:, :2], differentiable=True)
    images = torch.rand(2, 1, 2, 2)
    with pytest.raises(EdgekitError, match="three classes"):
        apgd(two, two, images, two(images).argmax(1), seeds=None, loss="dlr")


@pytest.mark.parametrize("classes", [2, 3])
def test_two_or_three_classes_are_enough_for_the_suites(classes) -> None:
    weight = torch.linspace(-1, 1, classes * 12).view(12, classes).sin()
    net = Wrapped(lambda batch: (batch.flatten(1) - 0.5) @ weight, differentiable=True)
    images = 0.4 + 0.2 * torch.rand(200, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    labels = net(images).argmax(1)
    # The nearest border, by Hoelder's inequality.
    gaps = (net(images).gather(1, labels[:, None]) - net(images)) / (
        weight.T[labels][:, None] - weight.T[None]
    ).abs().sum(2)
    distance = gaps.nan_to_num(torch.inf).scatter(1, labels[:, None], torch.inf).amin(1)
    epsilon = 1.001 * distance.median().item()
    _, fooled = targeted(net, net, images, labels, seeds=SEEDS[:200], epsilon=epsilon, steps=10)
    assert fooled.equal(distance < epsilon)


def test_wrong_classes_come_from_the_likeliest_downwards_and_without_the_true_one() -> None:
    logits = torch.tensor([[5.0, 1.0, 3.0], [5.0, 1.0, 3.0]])
    source = Wrapped(lambda images: logits, differentiable=True)
    found = likeliest(source, torch.zeros(2, 1, 1, 1), torch.tensor([0, 2]), 9)
    assert [target.tolist() for target in found] == [[2, 0], [1, 1]]
    assert len(likeliest(source, torch.zeros(2, 1, 1, 1), torch.tensor([0, 2]), 1)) == 1


def test_each_target_is_tried_and_more_of_them_find_more(net, digits) -> None:
    images, labels = digits[2:]
    found = [
        targeted(net, net, images, labels, seeds=SEEDS, epsilon=0.06, steps=10, targets=targets) for targets in (1, 9)
    ]
    assert (found[1][1] | ~found[0][1]).all()
    assert found[1][1].sum() > found[0][1].sum()
    untargeted = apgd(net, net, images, labels, seeds=SEEDS, epsilon=0.06, steps=10)[1]
    assert found[1][1].sum() >= untargeted.sum() - 1
    for adversarial, fooled in found:
        assert net(adversarial).argmax(1).ne(labels).equal(fooled)
        assert (adversarial - images).abs().max() <= 0.06 + 1e-6


def test_a_linear_judge_of_four_classes_falls_exactly_where_one_wrong_class_is_in_reach() -> None:
    generator = torch.Generator().manual_seed(4)
    weight, images = torch.randn(4, 27, generator=generator), 0.4 + 0.2 * torch.rand(200, 3, 3, 3, generator=generator)
    bias = -(images.flatten(1) @ weight.T).mean(0)
    judge = Wrapped(lambda batch: batch.flatten(1) @ weight.T + bias, differentiable=True)
    logits = judge(images)
    labels = logits.argmax(1)
    for norm, dual in (("Linf", 1), ("L2", 2)):
        away = torch.linalg.vector_norm(weight[None] - weight[labels][:, None], ord=dual, dim=2)
        distance = (logits.gather(1, labels[:, None]) - logits) / away  # to each border, by Hoelder's inequality
        distance = distance.scatter(1, labels[:, None], torch.inf).amin(1)
        epsilon = 1.0005 * distance.median().item()
        adversarial, fooled = targeted(
            judge, judge, images, labels, seeds=None, epsilon=epsilon, steps=30, targets=3, norm=norm
        )
        assert (fooled != (distance < epsilon)).sum() <= 1
        assert 90 < fooled.sum() < 110
        assert (
            torch.linalg.vector_norm((adversarial - images).flatten(1), ord={1: torch.inf, 2: 2}[dual], dim=1).max()
            <= epsilon + 1e-6
        )
