"""What a gradient through the int8 file's twin costs, against the folded float network that the file was made from.

One forward and backward pass each, on the same images, on one thread, medians of interleaved rounds. The float network
is edgekit's own fast path, batch normalization folded; both get their images channels-last.

    python benchmarks/twin.py [--quick] [--json]
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from common import Row, about_machine, document, publish, start
from common.students import noise, untrained
from torch import Tensor

from edgekit import twin
from edgekit.classifier import predict
from edgekit.console import say
from edgekit.errors import EdgekitError
from edgekit.formats import onnx
from edgekit.models import Network
from edgekit.models.fold import fold
from edgekit.quantize import SCHEMES, quantize

GOAL = 1 / 1.5  # the twin may take 1.5 times the float network's time
STUDENTS = {"mobilenetv2": 0.5, "resnet18": 0.5}


def int8_twin(student: Network) -> twin.Twin:
    """The twin of the student's int8 file, which answers as the file does or is not measured."""
    with tempfile.TemporaryDirectory() as folder:
        made = quantize(onnx.lower(student), noise(64, 20), SCHEMES["x86"])
        onnx.write_model(made.model, Path(folder), {})
        path = Path(folder) / onnx.FILE
        copy, some = twin.open(path), noise(32, 21)
        if not predict(copy, some).equal(predict(onnx.open(path, threads=1), some)):
            raise EdgekitError("the twin does not answer as its file does", where=path.name)
    return copy


def passes(classifier: Callable[[Tensor], Tensor], batch: Tensor) -> float:
    """Seconds of one forward and backward pass."""
    x = batch.clone().requires_grad_()
    before = time.perf_counter()
    torch.autograd.grad(classifier(x).logsumexp(1).sum(), x)
    return time.perf_counter() - before


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Seven rounds.")] = False,
    repetitions: Annotated[int, typer.Option(min=3, help="Rounds; each takes one pass of every network.")] = 31,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a pass.")] = 64,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Forward and backward through the twin of an int8 file against the float network."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    rounds = min(repetitions, 7) if quick else repetitions
    rows, seconds = [], {}
    for architecture, width in STUDENTS.items():
        say(f"{architecture}: exporting and quantizing")
        student = untrained(architecture, width)
        sides: dict[str, Callable[[Tensor], Tensor]] = {"twin": int8_twin(student), "float": fold(student)}
        for classifier in sides.values():  # unmeasured: kernels are chosen, weights packed
            passes(classifier, noise(batch_size, 0))
        times: dict[str, list[float]] = {name: [] for name in sides}
        for count in range(rounds):
            batch = noise(batch_size, 30 + count)
            # In turned order: a busy neighbour and a warm cache are shared fairly.
            for name in list(sides)[:: 1 if count % 2 else -1]:
                times[name].append(passes(sides[name], batch))
        ours, peer = (1000 * statistics.median(times[name]) for name in ("twin", "float"))
        what = f"forward and backward, {architecture} {width}, batch {batch_size}, 1 thread, median of {rounds}"
        rows.append(Row(what, ours, peer, "the float network, folded", peer / ours, GOAL, "ms"))
        seconds[architecture] = times
    publish(document("twin", rows, about_machine(threads=1), quick=quick, seconds=seconds), as_json=json)


if __name__ == "__main__":
    start(main)
