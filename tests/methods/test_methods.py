"""The objectives against NumPy, finite differences and a pair computed by hand."""

import math

import numpy
import pytest
import torch
from torch import nn

from edgekit.attacks.losses import cross_entropy
from edgekit.methods.inner import Inner, divergence
from edgekit.methods.rslad import rslad
from edgekit.methods.sat import sat
from edgekit.methods.trades import trades

SEEDS = torch.arange(6)
IMAGES = torch.rand(6, 2, 3, 3, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])
INNER = Inner(epsilon=0.1, step_size=0.04, steps=3)


def linear(seed: int) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(18, 4)).double()


def softmax(logits: numpy.ndarray) -> numpy.ndarray:
    shifted = numpy.exp(logits - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def logits(network: nn.Sequential, images: torch.Tensor) -> numpy.ndarray:
    layer = network[1]
    assert isinstance(layer, nn.Linear)
    return images.flatten(1).double().numpy() @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()


def recorded(inner: Inner):
    """An Inner that keeps what it found."""
    found = []

    def search(*arguments, **options):
        found.append(inner(*arguments, **options))
        return found[-1]

    return search, found


def test_divergence_by_hand_and_in_this_direction():
    # KL((3/4, 1/4) || (1/2, 1/2)) = 3/4 ln(3/2) + 1/4 ln(1/2); the other direction is 1/2 ln(2/3) + 1/2 ln 2.
    target, student = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
    assert divergence(student, target).sum().item() == pytest.approx(
        0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-7
    )
    assert divergence(target, student).sum().item() == pytest.approx(
        0.5 * math.log(2 / 3) + 0.5 * math.log(2), abs=1e-7
    )


def test_rslad_is_the_mean_over_classes_of_both_divergences():
    student, teacher, images = linear(0), linear(1), IMAGES.double()
    search, found = recorded(INNER)
    loss = rslad(student, teacher, images, LABELS, inner=search, seeds=SEEDS, robust_weight=0.7, scale=3.0)
    t = softmax(logits(teacher, images))

    def kl(x: torch.Tensor) -> numpy.ndarray:
        s = softmax(logits(student, x))
        return (t * (numpy.log(t) - numpy.log(s))).mean(1)

    assert loss.detach().numpy() == pytest.approx(3 * (0.7 * kl(found[0]) + 0.3 * kl(images)), abs=1e-12)


def test_rslad_ignores_labels_and_the_teacher_never_sees_the_attack():
    student, inputs = linear(0), []
    network = linear(1)

    def teacher(x: torch.Tensor) -> torch.Tensor:
        inputs.append(x.clone())
        return network(x)

    first = rslad(student, teacher, IMAGES.double(), LABELS, inner=INNER, seeds=SEEDS)  # pyright: ignore
    again = rslad(student, teacher, IMAGES.double(), (LABELS + 1) % 4, inner=INNER, seeds=SEEDS)  # pyright: ignore
    assert first.equal(again)
    assert len(inputs) == 2
    assert all(x.equal(IMAGES.double()) for x in inputs)


def test_trades_and_sat_against_numpy():
    student, images = linear(0), IMAGES.double()
    search, found = recorded(INNER)
    loss = trades(student, None, images, LABELS, inner=search, seeds=SEEDS, beta=2.5)
    clean, attacked = softmax(logits(student, images)), softmax(logits(student, found[0]))
    rows = numpy.arange(6)
    expected = -numpy.log(clean[rows, LABELS]) + 2.5 * (clean * numpy.log(clean / attacked)).sum(1)
    assert loss.detach().numpy() == pytest.approx(expected, abs=1e-12)
    loss = sat(student, None, images, LABELS, inner=search, seeds=SEEDS)
    assert loss.detach().numpy() == pytest.approx(
        -numpy.log(softmax(logits(student, found[1]))[rows, LABELS]), abs=1e-12
    )


@pytest.mark.parametrize("name", ["rslad", "trades", "sat"])
def test_gradients_by_finite_differences(name: str):
    """With the adversarial images held still, as the outer problem holds them."""
    student, teacher, images = linear(0), linear(1), IMAGES.double()
    still = (images + 0.05).clamp(0, 1)
    fixed = lambda *arguments, **options: still  # noqa: E731
    methods = {
        "rslad": lambda: rslad(student, teacher, images, LABELS, inner=fixed, seeds=SEEDS),  # pyright: ignore
        "trades": lambda: trades(student, None, images, LABELS, inner=fixed, seeds=SEEDS),  # pyright: ignore
        "sat": lambda: sat(student, None, images, LABELS, inner=fixed, seeds=SEEDS),  # pyright: ignore
    }
    layer = student[1]
    assert isinstance(layer, nn.Linear)
    methods[name]().mean().backward()
    gradient = layer.weight.grad
    assert gradient is not None
    for row, column in ((0, 0), (1, 5), (3, 17)):
        values = []
        for shift in (1e-6, -1e-6):
            with torch.no_grad():
                layer.weight[row, column] += shift
            values.append(methods[name]().mean().item())
            with torch.no_grad():
                layer.weight[row, column] -= shift
        assert gradient[row, column].item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5, abs=1e-9)


def test_inner_climbs_stays_in_the_ball_and_leaves_the_student_alone():
    student = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()).train()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    loss = lambda logits: cross_entropy(logits, LABELS)  # noqa: E731
    found = INNER(student, IMAGES, loss, SEEDS, spread=True)
    assert (found - IMAGES).abs().max() <= 0.1 + 1e-6
    assert found.min() >= 0
    assert found.max() <= 1
    assert student.training
    assert all(value.equal(before[name]) for name, value in student.state_dict().items())
    assert all(parameter.grad is None for parameter in student.parameters())
    student.eval()
    assert (loss(student(found)) > loss(student(IMAGES))).all()
    student.train()
    assert INNER(
        student, IMAGES[2:3], lambda logits: cross_entropy(logits, LABELS[2:3]), SEEDS[2:3], spread=True
    ).allclose(found[2:3], atol=1e-6)


def test_a_layer_that_no_view_can_replace_is_attacked_in_eval_mode_too():
    class Holder(nn.Module):
        """Its normalization is a registered child and is called through a list."""

        def __init__(self) -> None:
            super().__init__()
            self.normalize, self.classify = nn.BatchNorm2d(2), nn.Sequential(nn.Flatten(), nn.Linear(18, 4))
            self.path = [self.normalize, self.classify]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for part in self.path:
                x = part(x)
            return x

    for method in (sat, trades):
        student = Holder().train()
        seen = []
        student.normalize.register_forward_hook(lambda part, inputs, output, seen=seen: seen.append(part.training))
        method(student, None, IMAGES, LABELS, inner=INNER, seeds=SEEDS).mean().backward()
        attacked = INNER.steps + (method is trades)
        assert seen == [False] * attacked + [True] * (len(seen) - attacked)
        assert student.normalize.training
