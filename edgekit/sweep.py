"""Accuracy against the radius and against an attack's steps, on few samples: the curves of the report."""

from dataclasses import replace

import torch

from edgekit.attacks import parse
from edgekit.checks import share
from edgekit.classifier import Classifier
from edgekit.examine import Trial
from edgekit.report.evidence import Curves

SAMPLES = 100
RADII = (0.25, 0.5, 1.0, 1.5, 2.0)  # times the trial's own
STEPS = (1, 2, 5, 10, 20, 50)


def sweep(judge: Classifier, source: Classifier, trial: Trial) -> Curves:
    """Robust accuracy of `judge` under PGD on the first SAMPLES of the trial's draw, spread over it.

    Args:
        source: differentiable; its gradients are followed. Each point is an attack of its own from the same starts, so
            nothing forces the curves to fall: where they rise, the attack is at fault.
    """
    count = len(trial.labels)
    chosen = torch.arange(min(SAMPLES, count)) * count // min(SAMPLES, count)
    few = replace(trial, images=trial.images[chosen], labels=trial.labels[chosen], index=trial.index[chosen])

    def accuracy(steps: int, radius: float) -> float:
        one = replace(few, attacks=parse(f"pgd{steps}", trial.norm), epsilon=radius)
        return share(one.run(judge, {"source": source}).robust)

    largest = 1.0 if trial.norm == "Linf" else torch.inf
    radii = sorted({min(largest, times * trial.epsilon) for times in RADII})
    return Curves({radius: accuracy(20, radius) for radius in radii}, {n: accuracy(n, trial.epsilon) for n in STEPS})
