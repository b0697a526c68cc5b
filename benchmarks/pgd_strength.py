"""edgekit's PGD-20 against torchattacks' PGD on the float student: neither may be weaker than it claims.

Same student (benchmarks/students), images, epsilon, step size (epsilon / 4), steps and kind of start (uniform in the
ball). What each attack found is judged in one way: by the student, on clean images and on adversarial ones. Several
seeds, because a random start alone moves robust accuracy by some tenths of a point.

    python benchmarks/pgd_strength.py --data FOLDER [--quick] [--json]
"""

import statistics
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from common import Row, document, peers, publish, start
from common.students import CIFAR10, picked, robust

from edgekit import models
from edgekit.attacks.pgd import pgd
from edgekit.classifier import predict
from edgekit.console import say
from edgekit.randomness import derive

EPSILON, STEPS = 8 / 255, 20
SAMPLES, QUICK_SAMPLES = 1000, 100
POINTS = 0.5  # torchattacks may be stronger by no more than this


def main(
    data: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="CIFAR-10 as images, test/CLASS/*; not for --quick.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The 100 images in the repository, one seed.")] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of the starts.")] = 3,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Robust accuracy under edgekit's PGD-20 and under torchattacks'."""
    torch.set_flush_denormal(True)
    student = models.load(CIFAR10.weights).requires_grad_(False)
    split = picked(data, QUICK_SAMPLES if quick else SAMPLES, quick=quick)
    images, labels = split.floats(), split.labels
    right = predict(student, images).argmax(1) == labels
    runs = []
    with peers.Attackers(CIFAR10.weights, threads=torch.get_num_threads()) as attackers:
        for seed in range(1 if quick else seeds):
            begin = time.perf_counter()
            found = [
                pgd(student, student, x, y, seeds=derive(seed, samples=i), epsilon=EPSILON, steps=STEPS)[0]
                for x, y, i in zip(images.split(250), labels.split(250), split.index.split(250), strict=True)
            ]
            seconds = time.perf_counter() - begin
            other, other_seconds = attackers.run(
                "torchattacks-pgd", images, labels, epsilon=EPSILON, steps=STEPS, seed=seed
            )
            runs.append(
                {
                    "seed": seed,
                    "edgekit": robust(student, torch.cat(found), images, labels, EPSILON),
                    "torchattacks": robust(student, other, images, labels, EPSILON),
                    "edgekit_seconds": seconds,
                    "torchattacks_seconds": other_seconds,
                }
            )
            say(f"seed {seed}: robust {100 * runs[-1]['edgekit']:.1f} %, {100 * runs[-1]['torchattacks']:.1f} %")
    ours, theirs = (100 * statistics.mean(run[name] for run in runs) for name in ("edgekit", "torchattacks"))
    within = "" if quick else f"; at most {POINTS} points weaker: {'yes' if ours - theirs <= POINTS else 'NO'}"
    clean = 100 * right.double().mean().item()
    what = (
        f"robust accuracy under PGD-{STEPS}, {len(labels):,} images, mean of {len(runs)} seeds, clean {clean:.1f} % "
        f"(edgekit {ours - theirs:+.2f} points{within})"
    )
    rows = [
        Row(what, ours, theirs, "torchattacks 3.5.1, PGD", theirs / ours if ours else None, None, "%, less is stronger")
    ]
    publish(document("pgd_strength", rows, quick=quick, seeds=runs), as_json=json)
    raise typer.Exit(0 if quick or ours - theirs <= POINTS else 1)


if __name__ == "__main__":
    start(main)
