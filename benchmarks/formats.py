"""Every format that can be written here: kept decisions, robustness, size and speed of its files, in one table.

The student (benchmarks/students) is exported in all formats and precisions by `edgekit export --int8 --format all`, and
its files are attacked by `edgekit verify`, all on the same test images. Size and speed are those of an untrained
MobileNetV2 of full width, each int8 file against fp32 in its own runtime, one thread, in turn. `--keep` names the run
folder: what was attacked there already is not attacked again.

    python benchmarks/formats.py --data FOLDER [--keep RUN] [--samples N] [--only student|speed] [--quick] [--json]
"""

import shutil
import statistics
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import Row, about_machine, document, publish, start
from common.students import CIFAR10, noise, run_folder, untrained
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import edgekit
from edgekit import artifact
from edgekit.classifier import Classifier
from edgekit.console import say
from edgekit.errors import EdgekitError, choose
from edgekit.formats import FORMATS, onnx
from edgekit.quantize import SCHEMES, Settings, quantize, slim

AGREES = {"fp32": 0.995, "int8": 0.97}  # with the student, on validation images
SIZES = {"litert": 0.31}  # of fp32's, for int8
SIZE = 0.28
TOLD = ("verdict", "why", "clean_accuracy", "robust_accuracy", "change", "twin")
CALIBRATION = 64  # random images for the untrained network


def main(
    data: Annotated[Path | None, typer.Option(metavar="FOLDER", help="CIFAR-10 as images; not for --quick.")] = None,
    keep: Annotated[Path | None, typer.Option(metavar="RUN", help="The run folder, made where there is none.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Test images to attack.")] = 200,
    attack: Annotated[str, typer.Option(help="Attacks on the files.")] = "deployed",
    only: Annotated[str, typer.Option(help="student or speed; both by default.")] = "",
    repetitions: Annotated[int, typer.Option(min=3, help="Rounds at batch 32; ten times as many at batch 1.")] = 21,
    quick: Annotated[bool, typer.Option("--quick", help="Size and speed alone, few rounds, a quarter width.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """What each format keeps of the student, how large its files are and how fast."""
    parts = {"student": not quick, "speed": True}
    if only:
        choose(parts, only, "part", where="--only")
        parts = {name: name == only for name in parts}
    torch.set_num_threads(1)
    rows: list[Row] = []
    files: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        if parts["student"]:
            if data is None:
                raise EdgekitError("the images are needed", where="--data", mend="Name CIFAR-10 as a folder")
            folder = keep or Path(scratch) / "run"
            if not folder.exists():
                run_folder(CIFAR10, folder, data)
            files = student(folder, attack, samples)
            rows += [kept(one) for one in files if one["precision"] in AGREES and "agreement" in one]
        if parts["speed"]:
            rows += size_and_speed(Path(scratch), 0.25 if quick else 1.0, 3 if quick else repetitions, quick)
    result = document("formats", rows, about_machine(threads=1), quick=quick, files=files)
    publish(result, as_json=json, show=lambda people: show(people, files))


def student(folder: Path, attack: str, samples: int) -> list[dict[str, Any]]:
    """Each artifact of the student in the run `folder`, exported and verified there."""
    made = edgekit.export(folder, int8=True, formats="all")["artifacts"]
    told = edgekit.verify(folder, attack=attack, samples=samples, resume=True)
    by_name = {one["name"]: one for one in told["artifacts"]}
    found = []
    for one in made:
        judged = by_name[one["name"]]
        size = artifact.load(folder / "artifacts" / one["name"]).bytes
        about = {key: one[key] for key in ("name", "format", "precision")} | {"bytes": size}
        found.append(about | one.get("against_float", {}) | {key: judged[key] for key in TOLD if key in judged})
    return found


def kept(one: dict[str, Any]) -> Row:
    what = f"{one['name']}: decides as the student, {one['images']:,} validation images"
    return Row(what, 100 * one["agreement"], 100.0, "the student", one["agreement"], AGREES[one["precision"]], "%")


def size_and_speed(scratch: Path, width: float, rounds: int, quick: bool) -> list[Row]:
    """int8 against fp32 in each format's own runtime, of an untrained network."""
    # ExecuTorch takes no weights that lie channels-last.
    network = untrained("mobilenetv2", width).to(memory_format=torch.contiguous_format)  # pyright: ignore
    lowered, images = onnx.lower(network), noise(8 if quick else CALIBRATION, 20)
    rows = []
    for name, format in FORMATS.items():
        if "int8" not in format.PRECISIONS:
            continue
        if missing := next((package for package in format.PACKAGES if not find_spec(package)), None):
            say(f"{name} is left out: it needs the package {missing}")
            continue
        say(f"{name}: writing")
        paths = {precision: scratch / name / precision / format.FILE for precision in ("fp32", "int8")}
        for path in paths.values():
            path.parent.mkdir(parents=True)
        format.write(network, paths["fp32"].parent, {}, "fp32")
        made = quantize(lowered, images, SCHEMES[format.SCHEME], Settings(equalize=True, correct=True)).model
        format.write_model(slim(made) if name == "onnx" else made, paths["int8"].parent, {}, "int8")
        sizes = {precision: weight(path.parent) for precision, path in paths.items()}
        goal = 1 / SIZES.get(name, SIZE)
        ratio = sizes["fp32"] / sizes["int8"]
        what = f"{name}: size of the int8 file, full width" if width == 1 else f"{name}: size of the int8 file"
        rows.append(Row(what, sizes["int8"], sizes["fp32"], "fp32", ratio, None if quick else goal, "bytes"))
        try:
            judges = {precision: format.open(path, threads=1) for precision, path in paths.items()}
        except EdgekitError as error:
            say(f"{name}: not timed ({error})")
            continue
        for batch in (1, 32):
            times = in_turn(judges, noise(batch, 21).contiguous(), rounds * (10 if batch == 1 else 1))
            low, full = (1000 * statistics.median(times[precision]) for precision in ("int8", "fp32"))
            what = f"{name}: batch {batch}, int8 against fp32 in {format.RUNTIME}"
            rows.append(Row(what, low, full, "fp32", full / low, None if quick else 1.0, "ms"))
        shutil.rmtree(scratch / name)
    return rows


def weight(folder: Path) -> int:
    """Bytes of all that ships: the graph that is kept for gradients does not."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != artifact.TWIN)


def in_turn(judges: dict[str, Classifier], images: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of each, measured one after the other in every round, three rounds to warm up."""
    times: dict[str, list[float]] = {name: [] for name in judges}
    for round in range(rounds + 3):
        for name, judge in judges.items():
            begin = time.perf_counter()
            judge(images)
            if round >= 3:
                times[name].append(time.perf_counter() - begin)
    return times


def show(people: Console, files: list[dict[str, Any]]) -> None:
    if not files:
        return
    drawn = Table(title="The student's files", box=box.SIMPLE_HEAD)
    for head in ("file", "kB", "as the student %", "clean %", "robust %", "change", "twin %", "verdict"):
        drawn.add_column(head, justify="left" if head in ("file", "verdict") else "right")
    for one in files:
        change = one.get("change", {}).get("robust")
        cells = (
            one["name"],
            f"{one['bytes'] / 1000:.0f}",
            percent(one.get("agreement")),
            *(percent(one.get(key, {}).get("value")) for key in ("clean_accuracy", "robust_accuracy")),
            "–" if change is None else "{value:+.1f} [{low:+.1f}, {high:+.1f}]".format(**points(change)),
            percent(one.get("twin", {}).get("agreement")),
            one["verdict"],
        )
        drawn.add_row(*(Text(cell) for cell in cells))
    people.print(drawn)


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def points(change: dict[str, Any]) -> dict[str, float]:
    return {key: 100 * change[key] for key in ("value", "low", "high")}


if __name__ == "__main__":
    start(main)
