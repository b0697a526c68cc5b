"""DIVA: what it climbs, by hand, and whom it fools."""

import copy

import pytest
import torch

from edgekit.attacks.diva import Pair, diva, divergence
from edgekit.attacks.pgd import pgd
from edgekit.classifier import Wrapped
from edgekit.randomness import derive

torch.set_num_threads(1)
SEEDS = derive(0, 0, samples=torch.arange(297))


def test_the_loss_computed_by_hand() -> None:
    twin, original = torch.tensor([[0.2, 0.8]]).log() + 5, torch.tensor([[0.7, 0.3]]).log()
    assert divergence(torch.stack([twin, original], 1), torch.tensor([0])).item() == pytest.approx(0.7 - 0.2)
    assert divergence(torch.stack([twin, original], 1), torch.tensor([1])).item() == pytest.approx(0.3 - 0.8)


def test_it_fools_the_coarse_copy_and_spares_the_model_more_than_pgd_does(net, digits) -> None:
    images, labels = digits[2:]
    coarse = copy.deepcopy(net)
    for weight in coarse.parameters():
        scale = weight.abs().max() / 3
        weight.copy_((weight / scale).round() * scale)
    judge = Wrapped(lambda batch: coarse(batch).detach(), differentiable=False)
    agreed = (net(images).argmax(1) == labels) & (coarse(images).argmax(1) == labels)
    spared = {}
    for name, found in (
        ("diva", diva(Pair(coarse, net), judge, images, labels, seeds=SEEDS, epsilon=0.05)),
        ("pgd", pgd(coarse, judge, images, labels, seeds=SEEDS, epsilon=0.05)),
    ):
        adversarial, fooled = found
        assert judge(adversarial).argmax(1).ne(labels).equal(fooled)
        assert (adversarial - images).abs().max() <= 0.05 + 1e-6
        evaded = fooled & agreed & (net(adversarial).argmax(1) == labels)
        spared[name] = evaded.sum().item() / (fooled & agreed).sum().item()
        assert (fooled & agreed).sum() > 20
    assert spared["diva"] > spared["pgd"] + 0.1
