"""How strong the suites are: AutoAttack on the float student, and `deployed` on its int8 file, beside torchattacks.

On the float student edgekit's `autoattack` runs beside torchattacks' members with the authors' step counts, and beside
its AutoAttack wrapper, which leaves 10 steps. On the int8 file `deployed` is compared with what a user without edgekit
can do: show the file the images that fooled the float student. Every image is judged in one way, by the float student
in whole float32 and by the file in ONNX Runtime.

    python benchmarks/autoattack.py --data FOLDER [--samples N] [--device cuda] [--keep FOLDER] [--quick] [--json]

It takes hours on a CPU: with --keep what is finished stays in a folder, and the same command goes on from there. The
folder knows the student, the images and the version of edgekit, not its code: give changed code another.
"""

import hashlib
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import Row, about_machine, document, peers, publish, start
from common.students import CIFAR10, int8_file, picked, robust
from torch import Tensor

from edgekit import __version__, machine, models, twin
from edgekit.archive import Page
from edgekit.attacks import parse
from edgekit.attacks.campaign import CHUNK, Forgetful, Memory, Outcome, Part, confront
from edgekit.classifier import Classifier, Wrapped
from edgekit.console import say
from edgekit.errors import EdgekitError
from edgekit.files import digest, sha256
from edgekit.formats import onnx as onnx_format
from edgekit.models.fold import fold

EPSILON = 8 / 255
SAMPLES, QUICK_SAMPLES, CALIBRATION = 1000, 64, 36  # calibration: images of the draw that make the int8 file
OFFICIAL, WRAPPER = 100, 10  # steps
POINTS = 0.3  # by how much edgekit's AutoAttack may be weaker


def main(
    data: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="CIFAR-10 as images, test/CLASS/*; not for --quick.")
    ] = None,
    samples: Annotated[int, typer.Option(min=10, help="Images to attack; not for --quick.")] = SAMPLES,
    device: Annotated[str, typer.Option(help="Where gradients are computed; the file is judged on the CPU.")] = "cpu",
    keep: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where finished parts stay, to go on from; on a CPU alone.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="64 of the 100 images in the repository, 10 steps.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Robust accuracy under edgekit's suites and under torchattacks'."""
    place = machine.device(device)
    if keep is not None and place.type != "cpu":
        raise EdgekitError("parts are kept on a CPU alone", where="--keep", mend="Leave it out")
    torch.set_flush_denormal(True)
    torch.backends.cudnn.allow_tf32 = False
    count = QUICK_SAMPLES if quick else samples
    split = picked(data, count + CALIBRATION, quick=quick)
    images, labels, index = split.floats()[:count].to(place), split.labels[:count].to(place), split.index[:count]
    student = fold(models.load(CIFAR10.weights).requires_grad_(False).to(place))
    outcomes: dict[str, dict[str, Any]] = {}

    def note(
        name: str, judge: Classifier, adversarial: Tensor, seconds: float, members: dict[str, float] | None = None
    ) -> float:
        share = robust(judge, adversarial, images, labels, EPSILON)
        pixels = hashlib.sha256(adversarial.cpu().contiguous().numpy().tobytes()).hexdigest()
        outcomes[name] = {"robust": share, "seconds": seconds, "members": members or {}, "sha256": pixels}
        say(f"{name}: {100 * share:.1f} % robust, {seconds:.0f} s, images {pixels[:16]}")
        return 100 * share

    def memory(judge: str) -> Memory:
        """Of one judge, and of these images."""
        if keep is None:
            return Forgetful()
        keep.mkdir(parents=True, exist_ok=True)
        return Page(keep, digest(judge, sha256(CIFAR10.weights), images.numpy().tobytes(), __version__))

    def confronted(
        judge: Classifier, sources: dict[str, Classifier], names: str, kept: Memory
    ) -> tuple[Outcome, float]:
        outcome = confront(
            judge,
            sources,
            parse(names),
            images,
            labels,
            index.to(place),
            seed=0,
            epsilon=EPSILON,
            memory=kept,
            advance=lambda attack, samples: say(f"{attack.name}: {samples} images more"),
        )
        return outcome, sum(outcome.seconds.values())

    def replayed_from(attackers: peers.Attackers, attack: str, steps: int) -> tuple[Tensor, float]:
        """Images of a peer's attack, and seconds; a GPU takes all samples at once, a CPU as many as edgekit does."""
        kept, parts = memory("peers"), list[Part]()
        for number, chunk in enumerate(torch.arange(count).split(CHUNK if place.type == "cpu" else count)):
            part = kept.recall(f"{attack} {steps}", "float", number)
            if part is None:
                found, seconds = attackers.run(attack, images[chunk], labels[chunk], epsilon=EPSILON, steps=steps)
                part = Part(found, torch.empty(0), seconds)
                kept.keep(f"{attack} {steps}", "float", number, part)
                say(f"{attack}, {steps} steps: {len(chunk)} images more")
            parts.append(part)
        return torch.cat([part.adversarial for part in parts]), sum(part.seconds for part in parts)

    with tempfile.TemporaryDirectory() as scratch:
        plain = models.load(CIFAR10.weights).requires_grad_(False)
        path = int8_file(plain, split.floats()[count:], Path(scratch))
        session, copy = onnx_format.open(path, threads=machine.cores()), twin.open(path).to(place)
        file = Wrapped(lambda batch: session(batch.cpu()).to(batch.device), differentiable=False)
        torch.set_flush_denormal(True)  # the first session turns it off
        steps = WRAPPER if quick else OFFICIAL
        suite = f"apgd{steps},apgdt{steps},fab{steps},square{500 if quick else 5000}"
        outcome, seconds = confronted(student, {"float": student}, suite, memory("float"))
        mine = note("edgekit, autoattack, float", student, outcome.adversarial, seconds, outcome.seconds)
        own = outcome.adversarial
        outcome, seconds = confronted(file, {"float": student, "twin": copy}, "deployed", memory(sha256(path)))
        deployed = note("edgekit, deployed, int8", file, outcome.adversarial, seconds, outcome.seconds)
        note("edgekit's autoattack images on int8", file, own, 0.0)
        with peers.Attackers(CIFAR10.weights, threads=machine.cores()) as attackers:
            replayed = {}
            for name, attack, taken in (
                ("PGD-20", "torchattacks-pgd", 20),
                (f"AutoAttack, {WRAPPER} steps", "torchattacks-autoattack", WRAPPER),
                *([] if quick else [(f"AutoAttack, {OFFICIAL} steps", "torchattacks-autoattack", OFFICIAL)]),
            ):
                found, seconds = replayed_from(attackers, attack, taken)
                accuracy = note(f"torchattacks, {name}, float", student, found, seconds)
                replayed[name] = (accuracy, note(f"torchattacks' {name} images on int8", file, found, 0.0))
    rows = []
    ok = True
    for name, (accuracy, on_file) in replayed.items():
        if name != "PGD-20":
            near = mine - accuracy <= POINTS
            ok &= near
            what = f"float student: at most {POINTS} points above: {'yes' if near else 'NO'} ({mine - accuracy:+.2f})"
            rows.append(row(what, mine, accuracy, f"torchattacks 3.5.1, {name}"))
        low = deployed <= on_file if name != "PGD-20" else deployed < on_file
        ok &= low
        what = f"int8 file under `deployed`: as low as the replay: {'yes' if low else 'NO'} ({deployed - on_file:+.2f})"
        rows.append(row(what, deployed, on_file, f"its {name} images replayed"))
    about = about_machine(device=torch.cuda.get_device_name(place) if place.type == "cuda" else str(place))
    publish(document("autoattack", rows, about, quick=quick, samples=count, outcomes=outcomes), as_json=json)
    raise typer.Exit(0 if ok or quick else 1)


def row(what: str, ours: float, peer: float, peer_name: str) -> Row:
    return Row(what, ours, peer, peer_name, peer / ours if ours else None, None, "% robust, less is stronger")


if __name__ == "__main__":
    start(main)
