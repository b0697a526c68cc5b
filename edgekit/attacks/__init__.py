"""Attacks by name: `pgd20`, `pgd100x5` (five random starts), `pgd20-margin`, `pgd20@2/255` (the step), `autoattack`."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from edgekit.attacks.apgd import apgd, targeted
from edgekit.attacks.diva import NEEDS, diva
from edgekit.attacks.fab import fab
from edgekit.attacks.fgsm import fgsm
from edgekit.attacks.losses import LOSSES
from edgekit.attacks.nes import nes
from edgekit.attacks.norms import NORMS
from edgekit.attacks.pgd import pgd
from edgekit.attacks.square import square
from edgekit.attacks.suites import SUITES
from edgekit.classifier import Classifier
from edgekit.errors import EdgekitError, choose, nearest

MOST_STEPS, MOST_RESTARTS, LONGEST_STEP = 10_000, 100, 100.0

# What `edgekit attacks` lists and errors suggest; the numbers in a name are free.
ATTACKS: dict[str, str] = {
    "pgd20": "projected gradient descent on the cross-entropy, 20 steps of epsilon/4 from a random start",
    "pgd20@2/255": "the same with steps of 2/255",
    "pgd100x5": "the same with 100 steps, from 5 random starts",
    "pgd20-margin": "the same as pgd20 on the margin loss: the highest wrong logit minus the true one",
    "pgd20-kl": "the same on the KL divergence from the clean answer, from a start beside the image: TRADES",
    "apgd100": "Auto-PGD on the cross-entropy: 100 steps with momentum, each sample halving its own step size",
    "apgd100-dlr": "the same on the difference of logits ratio",
    "apgdt100": "the same towards each of 9 wrong classes, 100 steps for each",
    "fab100": "walks along the border to the nearest point of each of 9 wrong classes, 100 steps for each",
    "square1000": "random search with 1000 queries of the scores; needs no gradient",
    "nes500": "gradients estimated from 500 queries of the scores; needs no gradient",
    "diva20": "20 steps that fool the file and not the float model; needs the file's twin and the float model",
    "fgsm": "one step of epsilon along the sign of the gradient",
}


class Run(Protocol):
    """One start of an attack; what it promises stands in attacks/search.py."""

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

    Attributes:
        gradients: False where it follows no source: one run against the judge is all that there is.
        needs: the sources that it follows together, by name; any single one where that is empty.
        norm: the ball that it searches, a key of NORMS.
    """

    name: str
    restarts: int
    run: Run = field(compare=False)
    gradients: bool = True
    needs: tuple[str, ...] = ()
    norm: str = "Linf"


@dataclass(frozen=True)
class _Family:
    """What the names of one function may hold: the number has `unit` and is its keyword `steps` or `queries`."""

    function: Callable[..., tuple[Tensor, Tensor]]
    unit: str | None = "steps"
    restarts: bool = True
    losses: bool = False
    stepping: bool = False
    gradients: bool = True
    needs: tuple[str, ...] = ()


FAMILIES: dict[str, _Family] = {
    "fgsm": _Family(fgsm, unit=None, restarts=False),
    "pgd": _Family(pgd, losses=True, stepping=True),
    "apgd": _Family(apgd, losses=True),
    "apgdt": _Family(targeted),
    "fab": _Family(fab, restarts=False),
    "square": _Family(square, unit="queries", gradients=False),
    "nes": _Family(nes, unit="queries", gradients=False),
    "diva": _Family(diva, stepping=True, needs=NEEDS),
}

_NAME = re.compile(r"([a-z]+)(?:(\d+)(?:x(\d+))?)?(?:-(\w+))?(?:@([\d.]+(?:/\d+)?))?", re.ASCII)


def parse(names: str, norm: str = "Linf") -> tuple[Attack, ...]:
    """The attacks that a comma-separated list of attacks and suites names, in the ball of `norm`.

    What a suite holds besides is left out where it was there before.

    Raises:
        EdgekitError: a name means nothing, stands there twice, or asks for more steps or starts than are allowed;
            `norm` is not in NORMS.
    """
    choose(NORMS, norm, "norm")
    listed = [name.strip() for name in names.split(",")]
    for place, name in enumerate(listed):
        if name in listed[:place]:
            raise EdgekitError(f"the attack '{name}' is named twice")
    return tuple(dict.fromkeys(_attack(name, norm) for name in _expand(listed)))


def _expand(names: list[str]) -> Iterator[str]:
    for name in names:
        if name in SUITES:
            yield from _expand(SUITES[name].split(","))
        else:
            yield name


def _attack(name: str, norm: str) -> Attack:
    match = _NAME.fullmatch(name)
    family = FAMILIES.get(match[1]) if match else None
    if match is None or family is None or not _fits(family, match):
        raise EdgekitError(f"there is no attack '{name}'", mend=_nearest(name))
    choices: dict[str, Any] = {"norm": norm}
    if family.unit:
        choices[family.unit] = _count(name, family.unit, match[2], MOST_STEPS)
    if family.losses:
        choices["loss"] = match[4] or "ce"
        choose(LOSSES, choices["loss"], "loss", where=name)
    if match[5]:
        choices["step_size"] = _step(name, match[5])
    restarts = _count(name, "starts", match[3] or "1", MOST_RESTARTS)
    return Attack(name, restarts, partial(family.function, **choices), family.gradients, family.needs, norm)


def _fits(family: _Family, match: re.Match[str]) -> bool:
    """Whether the name holds a number exactly where one belongs, and nothing that the family does not take."""
    numbered = bool(match[2]) == bool(family.unit)
    allowed = (family.restarts or not match[3]) and (family.losses or not match[4])
    return numbered and allowed and (family.stepping or not match[5])


def _count(name: str, what: str, digits: str, most: int) -> int:
    # Judged by length first: int() refuses thousands of digits with an error of its own.
    if digits.startswith("0") or len(digits) > len(str(most)) or int(digits) > most:
        raise EdgekitError(
            f"there is no attack '{name}': the number of {what} goes from 1 to {most:,}", mend=_nearest(name)
        )
    return int(digits)


def _step(name: str, text: str) -> float:
    above, _, below = text.partition("/")
    try:
        step = float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError, OverflowError):
        step = 0.0
    if not 0 < step <= LONGEST_STEP:
        raise EdgekitError(
            f"there is no attack '{name}': the step is a number above 0, or a fraction", mend="Example: pgd20@2/255"
        )
    return step


def _nearest(name: str) -> str:
    return nearest(name.lower(), [*ATTACKS, *SUITES])
