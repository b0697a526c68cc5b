"""FAB against linear programming, against Hölder's inequality, and against what PGD reaches."""

import copy

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize
from torch import Tensor

from edgekit.attacks.fab import RETREAT, _retreat, fab, onto_plane
from edgekit.attacks.norms import NORMS
from edgekit.attacks.pgd import pgd
from edgekit.classifier import Wrapped
from edgekit.randomness import derive

torch.set_num_threads(1)
SEEDS = derive(0, 0, samples=torch.arange(297))


def shortest(x: np.ndarray, weight: np.ndarray, gap: float, norm: str) -> float:
    """The least norm of a move onto the plane within [0, 1], by a general solver."""
    size = len(x)
    if norm == "Linf":  # minimize r over (move, r) where |move_i| <= r
        above = np.vstack([np.hstack([sign * np.eye(size), -np.ones((size, 1))]) for sign in (1, -1)])
        bounds = [*((-x[i], 1 - x[i]) for i in range(size)), (0, None)]
        plane = np.append(weight, 0)[None]
        return linprog(np.append(np.zeros(size), 1), above, np.zeros(2 * size), plane, [gap], bounds).fun
    found = minimize(
        lambda move: move @ move,
        np.zeros(size),
        jac=lambda move: 2 * move,
        bounds=[(-x[i], 1 - x[i]) for i in range(size)],
        constraints={"type": "eq", "fun": lambda move: weight @ move - gap, "jac": lambda move: weight},
        method="SLSQP",
        options={"ftol": 1e-12, "maxiter": 500},
    )
    return float(np.sqrt(found.fun))


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_no_solver_finds_a_shorter_move_onto_the_plane(norm: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(30, 1, 2, 3, generator=generator).double()
    weight = torch.randn(30, 1, 2, 3, generator=generator).double()
    weight[:, 0, 0, 0] = 0  # a pixel that changes nothing
    room = torch.where(weight > 0, 1 - x, -x)
    most, least = (weight * room).flatten(1).sum(1), (weight * torch.where(weight > 0, -x, 1 - x)).flatten(1).sum(1)
    share = torch.linspace(0.05, 0.95, 30).double()
    gap = torch.where(torch.arange(30) % 2 == 0, share * most, share * least)  # of both signs, all within reach
    move = onto_plane(x, weight, gap, norm)
    assert (x + move).min() >= -1e-9
    assert (x + move).max() <= 1 + 1e-9
    assert torch.allclose((weight * move).flatten(1).sum(1), gap, atol=1e-9)
    order = float("inf") if norm == "Linf" else 2
    for i in range(30):
        length = torch.linalg.vector_norm(move[i], ord=order).item()
        best = shortest(x[i].flatten().numpy(), weight[i].flatten().numpy(), gap[i].item(), norm)
        assert length == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_a_plane_out_of_reach_is_approached_as_far_as_the_range_goes(norm: str) -> None:
    x, weight = torch.full((1, 1, 1, 3), 0.25), torch.tensor([1.0, -2.0, 0.0]).view(1, 1, 1, 3)
    move = onto_plane(x, weight, torch.tensor([100.0]), norm)
    assert move.flatten()[:2].tolist() == [0.75, -0.25]
    still = onto_plane(x, torch.zeros_like(weight), torch.tensor([1.0]), norm)
    assert still.equal(torch.zeros_like(x))


@pytest.mark.parametrize(("norm", "dual"), [("Linf", 1), ("L2", 2)])
def test_a_linear_judge_is_fooled_exactly_where_hoelder_says(norm: str, dual: int) -> None:
    generator = torch.Generator().manual_seed(4)
    weight, images = torch.randn(4, 27, generator=generator), 0.4 + 0.2 * torch.rand(200, 3, 3, 3, generator=generator)
    bias = -(images.flatten(1) @ weight.T).mean(0)
    judge = Wrapped(lambda batch: batch.flatten(1) @ weight.T + bias, differentiable=True)
    source = Wrapped(lambda batch: 3 * judge(batch), differentiable=True)  # the same borders, another object
    logits = judge(images)
    labels = logits.argmax(1)
    away = torch.linalg.vector_norm(weight[None] - weight[labels][:, None], ord=dual, dim=2)
    distance = (logits.gather(1, labels[:, None]) - logits) / away
    distance = distance.scatter(1, labels[:, None], torch.inf).amin(1)
    epsilon = 1.001 * distance.median().item()
    adversarial, fooled = fab(source, judge, images, labels, seeds=None, epsilon=epsilon, steps=10, norm=norm)
    assert fooled.equal(distance < epsilon)
    assert 90 < fooled.sum() < 110
    length = torch.linalg.vector_norm(adversarial - images, ord=float("inf") if dual == 1 else 2, dim=(1, 2, 3))
    assert length.max() <= epsilon + 1e-6


def one_by_one(net, image: Tensor, label: int, target: int, epsilon: float, steps: int, norm: str) -> list[Tensor]:
    """The algorithm for one image (1, C, H, W) and one target, planes reached by bisection: all it shows the judge."""
    order, x, shown = float("inf") if norm == "Linf" else 2, image, []

    def length(move: Tensor) -> float:
        return torch.linalg.vector_norm(move, ord=order).item()

    for _ in range(steps):
        z = x.clone().requires_grad_()
        logits = net(z)[0]
        value = logits[target] - logits[label]
        (weight,) = torch.autograd.grad(value, z)

        def move_from(y: Tensor, value=value.item(), weight=weight, x=x) -> Tensor:
            need = -(value + (weight * (y - x)).sum().item())
            speed = (weight.sign() if norm == "Linf" else weight) * (1 if need > 0 else -1)
            low, high = 0.0, 1e4
            for _ in range(60):
                middle = (low + high) / 2
                reached = abs((weight * ((y + middle * speed).clamp(0, 1) - y)).sum().item()) >= abs(need)
                low, high = (low, middle) if reached else (middle, high)
            return (y + high * speed).clamp(0, 1) - y

        own, clean = move_from(x), move_from(image)
        share = min(length(own) / (length(own) + length(clean)), 0.1)
        x = ((1 - share) * (x + 1.05 * own) + share * (image + 1.05 * clean)).clamp(0, 1)
        away = x - image
        inside = away.clamp(-epsilon, epsilon) if norm == "Linf" else away * min(1.0, epsilon / length(away))
        shown.append((image + inside).clamp(0, 1))
        if length(away) > epsilon and net(x).argmax() != label:
            x = image + 0.9 * away
    return shown


@pytest.mark.parametrize(("norm", "epsilon"), [("Linf", 0.03), ("L2", 0.2)])
def test_every_candidate_is_the_papers(net, digits, norm: str, epsilon: float) -> None:
    net, images, labels = copy.deepcopy(net).double(), digits[2][:8].double(), digits[3][:8]
    seen: list[Tensor] = []
    judge = Wrapped(lambda batch: seen.append(batch.detach().clone()) or net(batch), differentiable=False)
    _, fooled = fab(net, judge, images, labels, seeds=None, epsilon=epsilon, steps=6, targets=2, norm=norm)
    left = (~fooled).nonzero().squeeze(1).tolist()
    assert len(left) >= 4
    for i in left:
        order = net(images[i : i + 1])[0].argsort(descending=True).tolist()
        targets = [place for place in order if place != labels[i]][:2]
        for k, target in enumerate(targets):
            expected = one_by_one(net, images[i : i + 1], int(labels[i]), target, epsilon, 6, norm)
            for batch, candidate in zip(seen[1 + 6 * k : 7 + 6 * k], expected, strict=True):
                assert (batch - candidate).flatten(1).abs().amax(1).min() < 1e-6


def test_only_what_fools_the_source_from_outside_the_ball_is_taken_back() -> None:
    source = Wrapped(
        lambda batch: torch.stack([batch[:, 0, 0, 0] - 0.5, 0.5 - batch[:, 0, 0, 0]], 1), differentiable=True
    )
    center, x = (torch.tensor(pixels).view(4, 1, 1, 1) for pixels in ([0.55, 0.55, 0.55, 0.55], [0.46, 0.4, 0.7, 0.52]))
    back = _retreat(x, center, source, torch.zeros(4, dtype=torch.int64), NORMS["Linf"], 0.1)
    # It fools from inside, as a source may that is not the judge; from outside; not, from outside; not, from inside.
    assert torch.allclose(back.flatten(), torch.tensor([0.46, 0.55 - RETREAT * 0.15, 0.7, 0.52]))


def test_it_finds_about_what_pgd_finds_and_each_target_adds(net, digits) -> None:
    images, labels = digits[2:]
    theirs = pgd(net, net, images, labels, seeds=SEEDS, epsilon=0.06, steps=40, loss="margin")[1]
    one, all_of_them = (
        fab(net, net, images, labels, seeds=SEEDS, epsilon=0.06, steps=15, targets=targets) for targets in (1, 9)
    )
    assert all_of_them[1].sum() >= theirs.sum() - 3
    assert (all_of_them[1] | ~one[1]).all()
    assert all_of_them[1].sum() > one[1].sum()
    assert net(all_of_them[0]).argmax(1).ne(labels).equal(all_of_them[1])
    assert (all_of_them[0] - images).abs().max() <= 0.06 + 1e-6


def test_the_judge_sees_one_candidate_a_step_and_always_inside_the_ball(net, digits) -> None:
    images, labels = digits[2][:40], digits[3][:40]
    seen: list[Tensor] = []

    def ask(batch: Tensor) -> Tensor:
        seen.append(batch.clone())
        return net(batch).detach()

    judge = Wrapped(ask, differentiable=False)
    fab(net, judge, images, labels, seeds=None, epsilon=0.001, steps=5, targets=2)
    assert len(seen) == 1 + 2 * 5
    left = images[net(images).argmax(1) == labels]
    assert all((batch - left).abs().max() <= 0.001 + 1e-6 for batch in seen[1:] if len(batch) == len(left))
