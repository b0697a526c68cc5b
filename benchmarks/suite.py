"""What each attack of a suite adds on the int8 file of the benchmark student, and which sources found it.

The file is made here from the float student (benchmarks/students) and judged in ONNX Runtime; the float student and
the file's twin are the sources. "adds" counts the samples that an attack alone of all fooled: what would be lost
without it. No peer: the ratios of this table are there to choose the members of `deployed`.

    python benchmarks/suite.py --data FOLDER [--attack A,B] [--norm Linf|L2] [--samples N] [--quick] [--json]
"""

import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import Row, document, publish, start
from common.students import CIFAR10, int8_file, picked
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from edgekit import models, twin
from edgekit.attacks import parse
from edgekit.attacks.campaign import Outcome, confront
from edgekit.formats import onnx as onnx_format
from edgekit.models.fold import fold

EPSILON = {"Linf": 8 / 255, "L2": 0.5}
SAMPLES, QUICK_SAMPLES, CALIBRATION = 500, 64, 36  # calibration: the images behind those that are attacked
CANDIDATES = "pgd20,pgd20-margin,apgd20-dlr,apgdt10,fab10,square500,nes500,diva20"


def main(
    data: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="CIFAR-10 as images, test/CLASS/*; not for --quick.")
    ] = None,
    attack: Annotated[str, typer.Option(help="Attacks and suites, separated by commas.")] = CANDIDATES,
    norm: Annotated[str, typer.Option(help="Linf or L2.")] = "Linf",
    samples: Annotated[int, typer.Option(min=1, help="Images to attack; not for --quick.")] = SAMPLES,
    quick: Annotated[
        bool, typer.Option("--quick", help="64 of the 100 images in the repository, fewer steps.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Robust accuracy under each attack, what it alone fooled, and the time that it took."""
    attacks = parse("pgd10,pgd10-margin,apgdt5,square100,nes100,diva10" if quick else attack, norm)
    torch.set_num_threads(1)
    student = models.load(CIFAR10.weights).requires_grad_(False)
    count = QUICK_SAMPLES if quick else samples
    split = picked(data, count + CALIBRATION, quick=quick)
    images, labels, index = split.floats()[:count], split.labels[:count], split.index[:count]
    with tempfile.TemporaryDirectory() as scratch:
        folded = fold(student)
        path = int8_file(student, split.floats()[count:], Path(scratch))
        judge, copy = onnx_format.open(path, threads=1), twin.open(path)
        torch.set_flush_denormal(True)  # the first session turns it off
        sources = {"float": folded, "twin": copy}
        outcome = confront(judge, sources, attacks, images, labels, index, seed=0, epsilon=EPSILON[norm])
    members = added(outcome)
    unit, total = "% robust", 100 * outcome.robust.double().mean().item()
    rows = [Row(f"{member['attack']}", member["robust"], None, None, None, None, unit) for member in members]
    rows.append(Row("the worst case of all", total, None, None, None, None, unit))
    result = document("suite", rows, quick=quick, norm=norm, samples=len(labels), members=members)
    publish(result, as_json=json, show=lambda people: show(people, members))


def added(outcome: Outcome) -> list[dict[str, Any]]:
    """For each attack: robust accuracy in percent, samples that it alone fooled, seconds, robust accuracy by source."""
    by_attack: dict[str, dict[str, torch.Tensor]] = {}
    for (name, source), hit in outcome.fooled.items():
        by_attack.setdefault(name, {})[source] = hit
    fooled = {name: torch.stack(list(hits.values())).any(0) for name, hits in by_attack.items()}
    times = torch.stack(list(fooled.values())).sum(0)  # how many attacks fooled each sample
    return [
        {
            "attack": name,
            "robust": 100 * (~hit).double().mean().item(),
            "alone": int((hit & (times == 1)).sum()),
            "seconds": outcome.seconds[name],
            "sources": {source: 100 * (~one).double().mean().item() for source, one in by_attack[name].items()},
        }
        for name, hit in fooled.items()
    ]


def show(people: Console, members: list[dict[str, Any]]) -> None:
    drawn = Table(title="What each attack adds on the int8 file", box=box.SIMPLE_HEAD)
    for name in ("attack", "robust %", "it alone fooled", "seconds", "robust % by source"):
        drawn.add_column(name, justify="left" if name.startswith("attack") else "right")
    for member in members:
        sources = ", ".join(f"{source} {value:.1f}" for source, value in member["sources"].items())
        figures = (f"{member['robust']:.1f}", str(member["alone"]), f"{member['seconds']:.0f}", sources)
        drawn.add_row(*(Text(cell) for cell in (member["attack"], *figures)))
    people.print(drawn)


if __name__ == "__main__":
    start(main)
