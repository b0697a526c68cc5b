"""Int8 files: size, speed and kept accuracy of edgekit's beside those of ONNX Runtime's own quantizer and of NNCF.

Size and speed on untrained networks of full width, one thread of ONNX Runtime, all files in turn. Accuracy on the kept
student: decisions as the float student's on clean images and on the last PGD iterates made on it, and the paired change
of robust accuracy under `deployed`, every iterate judged by the file itself. All quantizers get the same calibration
images. The peers run in .venv-peers. `--attacked` says how many of the images the attacks on the files get: most of the
time goes there.

    python benchmarks/int8.py [--data FOLDER] [--samples N] [--attacked N] [--only SPEED|ACCURACY] [--quick] [--json]
"""

import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy
import onnx
import torch
import typer
from common import Row, about_machine, document, peers, publish, start
from common.students import CIFAR10, calibration_images, int8_file, noise, picked, untrained
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch.nn.functional import cross_entropy

from edgekit import models, ort, twin
from edgekit.attacks import Attack, parse
from edgekit.attacks.campaign import Outcome, confront
from edgekit.attacks.norms import NORMS, slope
from edgekit.classifier import Classifier, predict
from edgekit.console import say
from edgekit.errors import EdgekitError, choose
from edgekit.formats import onnx as onnx_format
from edgekit.models import Network
from edgekit.models.fold import fold
from edgekit.randomness import derive
from edgekit.saturation import unsafe_pairs
from edgekit.statistics import tango

EPSILON = 8 / 255
FLOAT, OURS = "fp32", "edgekit"
CALIBRATION = 64  # random images for the untrained networks
KEPT_CALIBRATION = 36  # of the 100 kept images, for --quick
# Smallest ratios: size of fp32 / int8; time of fp32 / int8 at each batch; time of the fastest peer / int8.
GOALS = {
    "mobilenetv2": {"size": 1 / 0.26, 1: 1.7, 32: 2.0, "peer": 1.05},
    "resnet18": {"size": 1 / 0.252, 1: 2.1, 32: 2.2, "peer": 1.0},
}
FEW = ("ORT QDQ per channel", "NNCF mixed")  # the peers of --quick
AGREEMENT, AGREEMENT_ATTACKED, LOSS = 98.5, 97.5, 0.5  # points


def main(
    data: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="CIFAR-10 as images; by default 100 in the repository.")
    ] = None,
    samples: Annotated[int, typer.Option(min=10, help="Test images, with --data.")] = 1000,
    attacked: Annotated[int, typer.Option(min=10, help="Of these, how many the files are attacked on.")] = 1000,
    only: Annotated[str, typer.Option(help="speed or accuracy; both by default.")] = "",
    attack: Annotated[str, typer.Option(help="Attacks on the files.")] = "deployed",
    repetitions: Annotated[int, typer.Option(min=3, help="Rounds at batch 32; ten times as many at batch 1.")] = 21,
    quick: Annotated[bool, typer.Option("--quick", help="Two peers, few rounds, 64 images, five steps.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Size, speed, agreement and robustness of int8 files."""
    parts = {"speed": True, "accuracy": True}
    if only:
        choose(parts, only, "part", where="--only")
        parts = {name: name == only for name in parts}
    torch.set_num_threads(1)
    rows: list[Row] = []
    speed: dict[str, Any] = {}
    measured: list[Measured] = []
    with tempfile.TemporaryDirectory() as scratch:
        for architecture in GOALS if parts["speed"] else ():
            place = Path(scratch) / architecture
            found, speed[architecture] = size_and_speed(architecture, place, 3 if quick else repetitions, quick)
            rows += found
        if parts["accuracy"]:
            folder = None if quick else data  # None: the kept images
            count = 64 if folder is None else samples
            split = picked(folder, count + (KEPT_CALIBRATION if folder is None else 0), quick=folder is None)
            given = split.floats()[count:] if folder is None else calibration_images(folder)
            tested = Samples(split.floats()[:count], split.labels[:count], split.index[:count])
            attacks = parse("pgd5" if quick else attack)
            measured = accuracy(tested, given, min(attacked, count), attacks, Path(scratch), quick)
            rows += accuracy_rows(measured, quick)
    about = about_machine(threads=1, runtime="ONNX Runtime, CPU, one thread")
    files = [one.figures() for one in measured]
    result = document("int8", rows, about, quick=quick, seconds=speed, files=files)
    publish(result, as_json=json, show=lambda people: show(people, files))


def made_by_all(network: Network, calibration: Tensor, folder: Path, quick: bool) -> dict[str, Path]:
    """fp32, edgekit's int8 file, and those of the peers; calibration (N, C, H, W) for all of them."""
    folder.mkdir()
    (folder / FLOAT).mkdir()
    (folder / OURS).mkdir()
    onnx_format.write(network, folder / FLOAT, {})
    files = {FLOAT: folder / FLOAT / onnx_format.FILE, OURS: int8_file(network, calibration, folder / OURS)}
    return files | peers.quantized(files[FLOAT], calibration, folder, FEW if quick else ())


def size_and_speed(architecture: str, folder: Path, rounds: int, quick: bool) -> tuple[list[Row], dict[str, Any]]:
    """The rows of one untrained network, and {batch: {file: seconds of each round}}."""
    say(f"{architecture}: quantizing")
    network, goals = untrained(architecture, 1.0), GOALS[architecture]
    files = made_by_all(network, noise(8 if quick else CALIBRATION, 20), folder, quick)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    rest = [name for name in files if name not in (FLOAT, OURS)]
    smallest = min(rest, key=sizes.__getitem__)
    rows = [
        compare(f"{architecture}: size of the file", sizes, OURS, FLOAT, goals["size"], "bytes"),
        compare(f"{architecture}: the same, against the smallest peer", sizes, OURS, smallest, None, "bytes"),
    ]
    sessions = {name: ort.Session(path, threads=1) for name, path in files.items()}
    kept: dict[str, Any] = {"bytes": sizes, "unsafe pairs": {name: pairs(path) for name, path in files.items()}}
    for batch in (1, 32):
        times = in_turn(sessions, noise(batch, 21).contiguous().numpy(), rounds * (10 if batch == 1 else 1))
        kept[f"batch {batch}"] = times
        medians = {name: 1000 * statistics.median(seconds) for name, seconds in times.items()}
        say(f"{architecture}, batch {batch}: " + ", ".join(f"{name} {value:.2f} ms" for name, value in medians.items()))
        fastest = min(rest, key=medians.__getitem__)
        for what, peer, goal in (("", FLOAT, goals[batch]), (", against the fastest peer", fastest, goals["peer"])):
            # A busy neighbour takes the cache from large weights first; a round that it left alone shows how much.
            alone = min(times[peer]) / min(times[OURS])
            stated = f"{architecture}: batch {batch}{what} (fastest rounds {alone:.2f})"
            rows.append(compare(stated, medians, OURS, peer, None if quick else goal, "ms"))
    return rows, kept


def compare(what: str, values: Mapping[str, float], ours: str, peer: str, goal: float | None, unit: str) -> Row:
    """A row of values of which the smaller is the better."""
    return Row(what, values[ours], values[peer], peer, values[peer] / values[ours], goal, unit)


def in_turn(sessions: Mapping[str, ort.Session], images: numpy.ndarray, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round; every round asks all sessions, each time another one first."""
    names = list(sessions)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-2, rounds):  # two rounds warm caches and memory pools up
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            begin = time.perf_counter()
            sessions[name](images)
            if turn >= 0:
                times[name].append(time.perf_counter() - begin)
    return times


def pairs(path: Path) -> int:
    """Pairs of weights whose products can clip in 16 bits, on x86 without VNNI."""
    return sum(unsafe_pairs(onnx.load(path)).values())


@dataclass(frozen=True)
class Samples:
    """images (N, C, H, W) float32 in [0, 1]; labels, index (N,) int64."""

    images: Tensor
    labels: Tensor
    index: Tensor


@dataclass(frozen=True)
class Measured:
    """What one file answers: (N,) bool each.

    Attributes:
        right, agrees, agrees_attacked: clean and right; as the float student, clean and on its last PGD iterates.
        robust, float_robust: of the samples that were attacked: the file, and the float student under the same.
        without: why there was no twin to follow; empty where there was one.
    """

    name: str
    bytes: int
    unsafe: int
    right: Tensor
    agrees: Tensor
    agrees_attacked: Tensor
    robust: Tensor
    float_robust: Tensor
    seconds: float
    without: str

    def figures(self) -> dict[str, Any]:
        low, high = paired(self.float_robust, self.robust)
        return {
            "file": self.name,
            "bytes": self.bytes,
            "unsafe_pairs": self.unsafe,
            "clean": percent(self.right),
            "agreement": percent(self.agrees),
            "agreement_attacked": percent(self.agrees_attacked),
            "attacked": len(self.robust),
            "robust": percent(self.robust),
            "float_robust": percent(self.float_robust),
            "change": percent(self.robust) - percent(self.float_robust),
            "low": low,
            "high": high,
            "seconds": self.seconds,
            "no_twin": self.without,
        }


def percent(hits: Tensor) -> float:
    return 100 * hits.double().mean().item()


def paired(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Tango's interval of second minus first, in points."""
    low, high = tango(int((first & ~second).sum()), int((second & ~first).sum()), len(first))
    return 100 * low, 100 * high


def accuracy(
    tested: Samples, calibration: Tensor, attacked: int, attacks: tuple[Attack, ...], scratch: Path, quick: bool
) -> list[Measured]:
    """Every int8 file of the kept student, edgekit's first.

    Args:
        attacked: how many of `tested`, spread evenly over them, `attacks` get.
    """
    say("the student: quantizing")
    plain = models.load(CIFAR10.weights).requires_grad_(False)
    files = made_by_all(plain, calibration, scratch / "student", quick)
    student = fold(models.load(CIFAR10.weights).requires_grad_(False).to(memory_format=torch.channels_last))
    judges = {name: onnx_format.open(path, threads=1) for name, path in files.items() if name != FLOAT}
    torch.set_flush_denormal(True)  # the first session turns it off
    last = last_iterates(student, tested, 5 if quick else 20)
    decided, decided_attacked = (predict(student, images).argmax(1) for images in (tested.images, last))
    chosen = torch.linspace(0, len(tested.labels) - 1, attacked).round().long()
    some = Samples(tested.images[chosen], tested.labels[chosen], tested.index[chosen])
    own = run(student, {"float": student}, some, attacks)
    say(f"float student: {percent(own.robust):.1f} % robust")
    measured = []
    for name, judge in judges.items():
        clean = predict(judge, tested.images).argmax(1)
        sources: dict[str, Classifier] = {"float": student}
        without, float_robust, begin = "", own.robust, time.perf_counter()
        try:
            sources["twin"] = copy = twin.open(files[name])
        except EdgekitError as error:
            without = str(error)
            say(f"{name}: no twin ({without})")
        else:
            # What follows no source did all that it can do to the student in `own`.
            climbing = tuple(one for one in attacks if one.gradients and not one.needs)
            float_robust = float_robust & run(student, {"twin": copy}, some, climbing).robust
        robust = run(judge, sources, some, attacks).robust
        one = Measured(
            name,
            files[name].stat().st_size,
            pairs(files[name]),
            clean == tested.labels,
            clean == decided,
            predict(judge, last).argmax(1) == decided_attacked,
            robust,
            float_robust,
            time.perf_counter() - begin,
            without,
        )
        measured.append(one)
        figures = one.figures()
        said = (
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in figures.items()
        )
        say(", ".join(said))
    return measured


def run(judge: Classifier, sources: dict[str, Classifier], some: Samples, attacks: tuple[Attack, ...]) -> Outcome:
    return confront(judge, sources, attacks, some.images, some.labels, some.index, seed=0, epsilon=EPSILON)


def last_iterates(student: Classifier, tested: Samples, steps: int) -> Tensor:
    """(N, C, H, W): where PGD from a random start stands after its last step, whether it fooled or not."""
    space, found = NORMS["Linf"], []
    for chunk in torch.arange(len(tested.labels)).split(250):
        images, labels = tested.images[chunk], tested.labels[chunk]
        x = space.project(space.start(derive(0, 0, samples=tested.index[chunk]), images, EPSILON), images, EPSILON)
        for _ in range(steps):
            rising = slope(cross_entropy(student(x.requires_grad_()), labels, reduction="none"), x)
            x = space.project(x.detach() + EPSILON / 4 * space.steepest(rising), images, EPSILON)
        found.append(x)
    return torch.cat(found)


def accuracy_rows(measured: list[Measured], quick: bool) -> list[Row]:
    """edgekit's file beside the best of the peers in each respect, with the paired interval of the difference."""
    ours, rest = measured[0], measured[1:]
    rows = []
    for what, key, wanted in (
        ("clean and right", "right", None),
        ("decides as the float student, clean images", "agrees", AGREEMENT),
        ("the same on the last PGD iterates made on the float student", "agrees_attacked", AGREEMENT_ATTACKED),
        (f"robust, {len(ours.robust)} images", "robust", None),
    ):
        best = max(rest, key=lambda one: percent(getattr(one, key)))
        mine, other = getattr(ours, key), getattr(best, key)
        value, peer, (low, high) = percent(mine), percent(other), paired(other, mine)
        goal = "" if wanted is None or quick else f"; goal {wanted:g}: {'reached' if value >= wanted else 'missed'}"
        where = f"{what}, {len(mine)} images" if key != "robust" else what
        stated = f"{where} ({value - peer:+.2f} [{low:+.2f}, {high:+.2f}] to the best peer{goal})"
        rows.append(Row(stated, value, peer, best.name, value / peer if peer else None, None, "%"))
    for one in measured:
        figures = one.figures()
        interval = f"[{figures['low']:+.2f}, {figures['high']:+.2f}]"
        goal = ""
        if one is ours and not quick:
            goal = f"; goal at worst -{LOSS:g}: {'reached' if figures['change'] >= -LOSS else 'missed'}"
        what = f"robust change of {one.name} {figures['change']:+.2f} {interval}{goal}"
        rows.append(Row(what, figures["robust"], figures["float_robust"], "the float student", None, None, "%"))
    return rows


def show(people: Console, files: list[dict[str, Any]]) -> None:
    if not files:
        return
    drawn = Table(title="The student's int8 files", box=box.SIMPLE_HEAD)
    heads = ("file", "kB", "unsafe pairs", "clean %", "as float %", "attacked as float %", "robust %", "change", "twin")
    for head in heads:
        drawn.add_column(head, justify="left" if head in ("file", "twin") else "right")
    for one in files:
        cells = (
            one["file"],
            f"{one['bytes'] / 1000:.0f}",
            f"{one['unsafe_pairs']:,}",
            *(f"{one[key]:.1f}" for key in ("clean", "agreement", "agreement_attacked", "robust")),
            f"{one['change']:+.2f} [{one['low']:+.2f}, {one['high']:+.2f}]",
            "no" if one["no_twin"] else "yes",
        )
        drawn.add_row(*(Text(cell) for cell in cells))
    people.print(drawn)


if __name__ == "__main__":
    start(main)
