"""The curves of the report, where they can be computed by hand."""

import torch

from edgekit.attacks import parse
from edgekit.classifier import Wrapped
from edgekit.examine import Trial
from edgekit.sweep import RADII, STEPS, sweep


def test_a_linear_file_falls_exactly_where_its_margins_end() -> None:
    images = torch.full((20, 1, 2, 2), 0.5)
    images[:, 0, 0, 0] += torch.linspace(0.006, 0.101, 20)  # how far each sample is from the border, times four pixels
    net = Wrapped(lambda x: torch.stack([x.flatten(1).sum(1) - 2, 2 - x.flatten(1).sum(1)], 1), differentiable=True)
    trial = Trial(parse("fgsm"), images, torch.zeros(20, dtype=torch.int64), torch.arange(20), 0.01, seed=1)
    curves = sweep(net, net, trial)
    distance = torch.linspace(0.006, 0.101, 20) / 4
    for times in RADII:
        assert curves.epsilon[times * 0.01] == (distance > times * 0.01).sum().item() / 20
    assert list(curves.steps) == list(STEPS)
    values = list(curves.steps.values())
    assert values == sorted(values, reverse=True) and values[-1] == curves.epsilon[0.01]
