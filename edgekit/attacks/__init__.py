"""Attacks by name: `pgd20`, `pgd100x5` (five random starts), `pgd20-margin`, `apgd100-dlr`, `square1000`, `fgsm`."""

import re
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from torch import Tensor

from edgekit.attacks.apgd import apgd
from edgekit.attacks.fgsm import fgsm
from edgekit.attacks.losses import LOSSES
from edgekit.attacks.pgd import pgd
from edgekit.attacks.square import square
from edgekit.classifier import Classifier
from edgekit.errors import EdgekitError, choose, nearest

MOST_STEPS, MOST_RESTARTS = 10_000, 100

# What `edgekit attacks` lists and errors suggest; the numbers in a name are free.
ATTACKS: dict[str, str] = {
    "pgd20": "projected gradient descent on the cross-entropy, 20 steps of epsilon/4 from a random start",
    "pgd100x5": "the same with 100 steps, from 5 random starts",
    "pgd20-margin": "the same as pgd20 on the margin loss: the highest wrong logit minus the true one",
    "apgd100": "Auto-PGD on the cross-entropy: 100 steps with momentum, each sample halving its own step size",
    "apgd100-dlr": "the same on the difference of logits ratio",
    "square1000": "random search with 1000 queries of the scores; needs no gradient",
    "fgsm": "one step of epsilon along the sign of the gradient",
}
STEPPING = {"pgd": pgd, "apgd": apgd}

_STEPS = re.compile(r"(pgd|apgd)(\d+)(?:x(\d+))?(?:-(\w+))?", re.ASCII)
_SQUARE = re.compile(r"square(\d+)(?:x(\d+))?", re.ASCII)


class Run(Protocol):
    """One start of an attack; what it promises stands in attacks/pgd.py."""

    def __call__(
        self,
        source: Classifier,
        judge: Classifier,
        images: Tensor,
        labels: Tensor,
        *,
        seeds: Tensor | None,
        epsilon: float,
    ) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Attack:
    """An attack with all its choices made but the budget: `run` it `restarts` times, each with seeds of its own.

    `gradients` is False where it follows no source: one run against the judge is all that there is.
    """

    name: str
    restarts: int
    run: Run = field(compare=False)
    gradients: bool = True


def parse(names: str) -> tuple[Attack, ...]:
    """The attacks that a comma-separated list names.

    Raises:
        EdgekitError: a name means nothing, stands there twice, or asks for more steps or starts than are allowed.
    """
    attacks = tuple(_attack(name.strip()) for name in names.split(","))
    for place, attack in enumerate(attacks):
        if attack in attacks[:place]:
            raise EdgekitError(f"the attack '{attack.name}' is named twice")
    return attacks


def _attack(name: str) -> Attack:
    if name == "fgsm":
        return Attack(name, 1, fgsm)
    if match := _SQUARE.fullmatch(name):
        queries = _count(name, "queries", match[1], MOST_STEPS)
        restarts = _count(name, "starts", match[2] or "1", MOST_RESTARTS)
        return Attack(name, restarts, partial(square, queries=queries), gradients=False)
    match = _STEPS.fullmatch(name)
    if not match:
        raise EdgekitError(f"there is no attack '{name}'", mend=nearest(name.lower(), ATTACKS))
    loss = match[4] or "ce"
    choose(LOSSES, loss, "loss", where=name)
    steps = _count(name, "steps", match[2], MOST_STEPS)
    restarts = _count(name, "starts", match[3] or "1", MOST_RESTARTS)
    return Attack(name, restarts, partial(STEPPING[match[1]], steps=steps, loss=loss))


def _count(name: str, what: str, digits: str, most: int) -> int:
    # Judged by length first: int() refuses thousands of digits with an error of its own.
    if digits.startswith("0") or len(digits) > len(str(most)) or int(digits) > most:
        raise EdgekitError(
            f"there is no attack '{name}': the number of {what} goes from 1 to {most:,}", mend=nearest(name, ATTACKS)
        )
    return int(digits)
