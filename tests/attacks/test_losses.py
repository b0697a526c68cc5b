import math

import torch

from edgekit.attacks.losses import LOSSES


def test_values_computed_by_hand() -> None:
    logits, labels = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 0.0]]), torch.tensor([0, 2])
    expected = [math.log(math.e**2 + 1 + math.e) - 2, math.log(2 + math.e**3)]
    assert torch.allclose(LOSSES["ce"](logits, labels), torch.tensor(expected))
    assert LOSSES["margin"](logits, labels).equal(torch.tensor([-1.0, 3.0]))
    assert torch.allclose(LOSSES["dlr"](logits, labels), torch.tensor([-0.5, 1.0]))  # over 2 - 0 and 3 - 0
    assert torch.allclose(LOSSES["dlr"](1000 * logits, labels), torch.tensor([-0.5, 1.0]))


def test_the_margin_is_positive_exactly_where_the_answer_is_wrong() -> None:
    logits = torch.randn(500, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(500) % 7
    assert (LOSSES["margin"](logits, labels) > 0).equal(logits.argmax(1) != labels)


def test_gradients_of_one_sample_do_not_know_the_others() -> None:
    logits, labels = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 4
    for loss in LOSSES.values():
        x = logits.clone().requires_grad_()
        loss(x, labels).sum().backward()
        alone = logits[2:3].clone().requires_grad_()
        loss(alone, labels[2:3]).sum().backward()
        assert x.grad is not None and alone.grad is not None
        assert x.grad[2:3].equal(alone.grad)
