"""What an attack costs: edgekit beside torchattacks and Foolbox, on the same student, images and number of threads.

PGD-20 on the float student, on all images and on those alone that no attack here fools; AutoAttack's four with the step
counts that torchattacks' wrapper leaves at 10, and with the official ones; and PGD-20 on the int8 file, judged in ONNX
Runtime at every iterate. The others run in .venv-peers as their users run them: contiguous images, denormals as torch
leaves them. Rounds are interleaved.

    python benchmarks/verify.py [--data FOLDER] [--samples N] [--official] [--quick] [--json]
"""

import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import torch
import typer
from common import Row, about_machine, document, peers, publish, start
from common.students import CIFAR10, int8_file, picked, robust
from torch import Tensor

from edgekit import models, twin
from edgekit.attacks import parse
from edgekit.attacks.campaign import Outcome, confront
from edgekit.classifier import Classifier
from edgekit.console import say
from edgekit.formats import onnx as onnx_format
from edgekit.models.fold import fold

EPSILON, STEPS = 8 / 255, 20
CALIBRATION = 36  # images of the draw that make the int8 file; the others are attacked
SAMPLES = 64  # of the 100 in the repository
WRAPPER = 10  # steps of APGD, APGD-T and FAB in torchattacks.AutoAttack; the authors' code takes 100
POINTS = 0.3  # by how much edgekit's AutoAttack may be weaker


def main(
    data: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="CIFAR-10 as images; by default 64 in the repository.")
    ] = None,
    samples: Annotated[int, typer.Option(min=10, help="Images to attack, with --data.")] = 250,
    repetitions: Annotated[int, typer.Option(min=1, help="Rounds of the PGD rows.")] = 5,
    official: Annotated[bool, typer.Option("--official", help="AutoAttack with 100 steps as well: long.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="One round, no AutoAttack.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Seconds and robust accuracy of edgekit's attacks and of other libraries'."""
    torch.set_num_threads(1)
    count = SAMPLES if quick or data is None else samples
    split = picked(data, count + CALIBRATION, quick=quick or data is None)
    images, labels, index = split.floats()[:count], split.labels[:count], split.index[:count]
    plain = models.load(CIFAR10.weights).requires_grad_(False)
    student = fold(models.load(CIFAR10.weights).requires_grad_(False).to(memory_format=torch.channels_last))
    floating: dict[str, Classifier] = {"float": student}
    rows, kept = [], {}
    with tempfile.TemporaryDirectory() as scratch, peers.Attackers(CIFAR10.weights, threads=1) as attackers:
        path = int8_file(plain, split.floats()[count:], Path(scratch))
        judge, copy = onnx_format.open(path, threads=1), twin.open(path)
        torch.set_flush_denormal(True)  # the first session turns it off

        def ours(
            name: str, judge: Classifier, sources: Mapping[str, Classifier], some: Tensor
        ) -> tuple[Outcome, float]:
            begin = time.perf_counter()
            outcome = confront(
                judge, sources, parse(name), images[some], labels[some], index[some], seed=0, epsilon=EPSILON
            )
            return outcome, time.perf_counter() - begin

        def theirs(name: str, steps: int, some: Tensor) -> tuple[float, float]:
            found, seconds = attackers.run(name, images[some], labels[some], epsilon=EPSILON, steps=steps)
            return robust(plain, found, images[some], labels[some], EPSILON), seconds

        everything = torch.arange(count)
        hard = ours("pgd100x3,pgd100-margin", student, floating, everything)[0].robust.nonzero().squeeze(1)
        say(f"{len(hard)} of {count} images stay robust to the end")
        times: dict[str, list[float]] = {}
        found: dict[str, float] = {}

        def note(name: str, accuracy: float, seconds: float) -> None:
            found[name] = accuracy
            times.setdefault(name, []).append(seconds)

        for _ in range(1 if quick else repetitions):
            for what, some in (("all", everything), ("hard", hard)):
                outcome, seconds = ours("pgd20", student, floating, some)
                note(f"edgekit {what}", outcome.robust.double().mean().item(), seconds)
                for peer in ("torchattacks-pgd", "foolbox-pgd"):
                    note(f"{peer} {what}", *theirs(peer, STEPS, some))
            outcome, seconds = ours("pgd20", judge, {"twin": copy}, everything)
            note("int8 twin", outcome.robust.double().mean().item(), seconds)
            outcome, seconds = ours("pgd20", judge, floating | {"twin": copy}, everything)
            note("int8 both", outcome.robust.double().mean().item(), seconds)
            say(", ".join(f"{name} {seconds[-1]:.2f} s" for name, seconds in times.items()))
        speed = {name: statistics.median(seconds) for name, seconds in times.items()}

        def compare(what: str, mine: str, peer: str, peer_name: str, size: int, goal: float | None) -> None:
            figures = f"robust {100 * found[mine]:.1f} % against {100 * found[peer]:.1f} %"
            rate, other = size / speed[mine], size / speed[peer]
            rows.append(Row(f"{what} ({figures})", rate, other, peer_name, rate / other, goal, "images/s"))

        for peer, name in (("torchattacks-pgd", "torchattacks 3.5.1"), ("foolbox-pgd", "Foolbox 3.3.4")):
            everyone, rest = (None, None) if quick else (3.0, 1.5)
            compare(f"PGD-20, float student, {count} images", "edgekit all", f"{peer} all", name, count, everyone)
            compare(f"the same, {len(hard)} robust ones", "edgekit hard", f"{peer} hard", name, len(hard), rest)
        peer, name = "torchattacks-pgd all", "torchattacks 3.5.1, float student"
        compare("PGD-20 on the int8 file from its twin", "int8 twin", peer, name, count, None if quick else 1.0)
        compare("PGD-20 on the int8 file from float and twin", "int8 both", peer, name, count, None)
        for steps in () if quick else (WRAPPER, *([100] if official else [])):
            names = f"apgd{steps},apgdt{steps},fab{steps},square5000"
            outcome, seconds = ours(names, student, floating, everything)
            accuracy, other_seconds = theirs("torchattacks-autoattack", steps, everything)
            mine = outcome.robust.double().mean().item()
            weaker = 100 * (mine - accuracy)
            kept[f"autoattack {steps}"] = {"edgekit": mine, "torchattacks": accuracy}
            what = (
                f"AutoAttack, {steps} steps, {count} images (robust {100 * mine:.1f} % against {100 * accuracy:.1f} %; "
                f"at most {POINTS} points above: {'yes' if weaker <= POINTS else 'NO'})"
            )
            goal = 3.0 if steps == WRAPPER else None
            rows.append(Row(what, seconds, other_seconds, "torchattacks 3.5.1", other_seconds / seconds, goal, "s"))
    result = document(
        "verify", rows, about_machine(threads=1), quick=quick, seconds=times, robust=found, autoattack=kept
    )
    publish(result, as_json=json)


if __name__ == "__main__":
    start(main)
