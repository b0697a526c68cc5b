"""The same int8 file on several processors: edgekit's, and one of the same student whose pair sums can clip.

Both files are made here from the float student (benchmarks/students), judged by `edgekit verify` on this machine and on
the emulated ones (make processors), every iterate of the attack on each. No peer: the ratio is the share of images that
a processor decides as this machine does.

    python benchmarks/processors.py --data FOLDER [--on native,x86-avx2,arm64] [--samples N] [--quick] [--json]
"""

import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import Row, document, publish, start
from common.students import CIFAR10, picked
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import edgekit
from edgekit import models, processors
from edgekit.data import Split
from edgekit.formats import onnx as onnx_format
from edgekit.quantize import SCHEMES, quantize, unsafe_pairs

SAMPLES, QUICK_SAMPLES, CALIBRATION = 200, 16, 36  # calibration: the images behind those that are attacked
FILES = {
    "edgekit's int8": SCHEMES["x86"],
    "8-bit weights, made to saturate": dataclasses.replace(SCHEMES["x86"], cannot_saturate=False),
}


def main(
    data: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="CIFAR-10 as images, test/CLASS/*; not for --quick.")
    ] = None,
    on: Annotated[str, typer.Option(metavar="A,B", help="Processors, as edgekit verify takes them.")] = (
        "native,x86-avx2,arm64"
    ),
    samples: Annotated[int, typer.Option(min=1, help="Images to attack; not for --quick.")] = SAMPLES,
    quick: Annotated[bool, typer.Option("--quick", help="16 of the images in the repository, PGD-5.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Accuracy of both files on each processor, and how often each decides as this machine."""
    processors.require(processors.parse(on))
    torch.set_num_threads(1)
    count = QUICK_SAMPLES if quick else samples
    split = picked(data, count + CALIBRATION, quick=quick)
    source, calibration = onnx_format.lower(models.load(CIFAR10.weights)), split.floats()[count:]
    rows: list[Row] = []
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        photos(split[:count], Path(scratch) / "photos")
        os.chdir(scratch)  # where the verdicts go
        for name, scheme in FILES.items():
            model = quantize(source, calibration, scheme).model
            Path(name).mkdir()
            onnx_format.write_model(model, Path(name), {})
            told = edgekit.verify(
                Path(name) / onnx_format.FILE, data="photos", attack="pgd5" if quick else "pgd20", samples=count, on=on
            )
            (artifact,) = told["artifacts"]
            pairs = sum(unsafe_pairs(model).values())
            for place in artifact["judged_on"]:
                found.append({"file": name, "unsafe_pairs": pairs, **place})
                if place["processor"] != processors.NATIVE:
                    what = f"{name} on {place['processor']}: decides as this machine"
                    rows.append(Row(what, 100 * place["agreement"], 100.0, "native", place["agreement"], None, "%"))
    publish(document("processors", rows, quick=quick, places=found), as_json=json, show=lambda to: show(to, found))


def photos(split: Split, folder: Path) -> None:
    """Write images as lossless files, FOLDER/CLASS/NUMBER.png."""
    for number, (image, label) in enumerate(zip(split.images, split.labels.tolist(), strict=True)):
        place = folder / f"{label}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{number:04}.png")


def show(people: Console, found: list[dict[str, Any]]) -> None:
    drawn = Table(title="Judged on each processor", box=box.SIMPLE_HEAD)
    for name in ("file", "unsafe pairs", "processor", "clean %", "robust %", "as native %", "scores within", "images"):
        drawn.add_column(name, justify="left" if name in ("file", "processor") else "right")
    for one in found:
        figures = (
            f"{100 * one['clean_accuracy']['value']:.1f}",
            f"{100 * one['robust_accuracy']['value']:.1f}",
            f"{100 * one['agreement']:.2f}",
            "bit for bit" if one["max_abs_difference"] == 0 else f"{one['max_abs_difference']:.2g}",
            f"{one['images']:,}",
        )
        drawn.add_row(*(Text(cell) for cell in (one["file"], f"{one['unsafe_pairs']:,}", one["processor"], *figures)))
    people.print(drawn)


if __name__ == "__main__":
    start(main)
