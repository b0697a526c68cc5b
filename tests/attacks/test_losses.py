import math

import pytest
import torch

from edgekit.attacks.losses import LOSSES, aim, targeted_dlr, towards
from edgekit.classifier import Wrapped
from edgekit.errors import EdgekitError


def test_values_computed_by_hand() -> None:
    logits, labels = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 0.0]]), torch.tensor([0, 2])
    expected = [math.log(math.e**2 + 1 + math.e) - 2, math.log(2 + math.e**3)]
    assert torch.allclose(LOSSES["ce"](logits, labels), torch.tensor(expected))
    assert LOSSES["margin"](logits, labels).equal(torch.tensor([-1.0, 3.0]))
    assert torch.allclose(LOSSES["dlr"](logits, labels), torch.tensor([-0.5, 1.0]))  # over 2 - 0 and 3 - 0
    assert torch.allclose(LOSSES["dlr"](1000 * logits, labels), torch.tensor([-0.5, 1.0]))


def test_targeted_dlr_and_kl_computed_by_hand() -> None:
    logits = torch.tensor([[4.0, 1.0, 2.0, -2.0]])
    # Towards class 1, from class 0: (1 - 4) / (4 - (1 - 2) / 2): the third and fourth highest are 1 and -2.
    assert targeted_dlr(logits, torch.tensor([[0, 1]])).item() == pytest.approx(-3 / 4.5)
    assert targeted_dlr(100 * logits - 7, torch.tensor([[0, 3]])).item() == pytest.approx(-6 / 4.5)
    clean, now = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.1, 0.2, 0.7]])
    by_hand = 0.5 * math.log(5) + 0.25 * math.log(1.25) + 0.25 * math.log(0.25 / 0.7)
    assert LOSSES["kl"](now.log() + 3, clean.log()).item() == pytest.approx(by_hand)
    with pytest.raises(EdgekitError, match="four classes"):
        targeted_dlr(logits[:, :3], torch.tensor([[0, 1]]))
    assert towards(logits[:, :3], torch.tensor([[0, 1]])).item() == 1 - 4  # the target's lead, which rises towards it
    assert towards(logits, torch.tensor([[0, 1]])).item() == pytest.approx(-3 / 4.5)


def test_the_margin_is_positive_exactly_where_the_answer_is_wrong() -> None:
    logits = torch.randn(500, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(500) % 7
    assert (LOSSES["margin"](logits, labels) > 0).equal(logits.argmax(1) != labels)


def test_gradients_of_one_sample_do_not_know_the_others() -> None:
    logits, labels = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 4
    source = Wrapped(lambda images: images.flatten(1)[:, :4], differentiable=True)
    images = torch.rand(6, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    for name, loss in LOSSES.items():
        goal = aim(name, source, images, labels)
        x = logits.clone().requires_grad_()
        loss(x, goal).sum().backward()
        alone = logits[2:3].clone().requires_grad_()
        loss(alone, goal[2:3]).sum().backward()
        assert x.grad is not None and alone.grad is not None
        assert x.grad[2:3].equal(alone.grad)
