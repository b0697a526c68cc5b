"""The two balls against their definitions and against brute force."""

import pytest
import torch
from torch import Tensor

from edgekit.attacks.norms import NORMS
from edgekit.randomness import derive

torch.set_num_threads(1)
GENERATOR = torch.Generator().manual_seed(0)
IMAGES, FAR = torch.rand(40, 3, 4, 4, generator=GENERATOR), 3 * torch.randn(40, 3, 4, 4, generator=GENERATOR)


def numpy_length(perturbation: Tensor, norm: str) -> Tensor:
    order = {"Linf": float("inf"), "L2": 2}[norm]
    return torch.stack([torch.linalg.vector_norm(sample.double().flatten(), ord=order) for sample in perturbation])


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_a_projection_lies_in_the_ball_and_moves_nothing_that_lies_there(norm: str) -> None:
    space, epsilon = NORMS[norm], {"Linf": 0.1, "L2": 0.6}[norm]
    inside = space.project(FAR, IMAGES, epsilon)
    assert (numpy_length(inside - IMAGES, norm) <= epsilon + 1e-6).all()
    assert inside.min() >= 0
    assert inside.max() <= 1
    assert space.project(inside, IMAGES, epsilon).allclose(inside, atol=1e-6)
    assert space.project(IMAGES, IMAGES, 0.0).equal(IMAGES)
    assert torch.allclose(space.length(FAR).double(), numpy_length(FAR, norm))
    # Unhindered by the pixel range, the far point comes to lie on the border.
    grey = torch.full_like(IMAGES, 0.5)
    assert numpy_length(space.project(FAR, grey, 0.3) - grey, norm).sub(0.3).abs().max() < 1e-6


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("scale", [1.0, 1e-30])
def test_no_direction_of_length_one_is_steeper(norm: str, scale: float) -> None:
    space, gradient = NORMS[norm], FAR * scale
    best = space.steepest(gradient)
    assert torch.allclose(space.length(best), torch.ones(40))
    rise = (best * FAR).flatten(1).sum(1)
    for _ in range(200):
        other = torch.randn(40, 3, 4, 4, generator=GENERATOR)
        other /= space.length(other)[:, None, None, None]
        assert (rise > (other * FAR).flatten(1).sum(1)).all()


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_a_gradient_that_is_none_points_nowhere(norm: str) -> None:
    for value in (0.0, torch.nan):
        assert NORMS[norm].steepest(torch.full((2, 1, 3, 3), value)).equal(torch.zeros(2, 1, 3, 3))


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_one_pixel_without_a_gradient_leaves_the_others_theirs(norm: str) -> None:
    spoilt, expected = FAR.clone(), FAR.clone()
    spoilt[:, 1, 2, 3], expected[:, 1, 2, 3] = torch.nan, 0
    assert NORMS[norm].steepest(spoilt).equal(NORMS[norm].steepest(expected))


def test_starts_in_the_l2_ball_are_uniform() -> None:
    grey = torch.full((4000, 1, 1, 3), 0.5)
    start = NORMS["L2"].start(derive(0, samples=torch.arange(4000)), grey, 0.2) - grey
    length = start.flatten(1).norm(dim=1)
    assert length.max() <= 0.2 + 1e-6
    # In three dimensions half the radius holds an eighth of the ball: 500 of 4,000, standard deviation 21.
    assert abs((length < 0.1).sum().item() - 500) < 84
    assert start.mean(0).abs().max() < 0.006
