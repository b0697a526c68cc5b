"""What edgekit's setting of GOMP_SPINCOUNT costs on a quiet machine, and what it saves beside a busy neighbour.

libgomp's threads wait for their next piece of work by spinning. With as many busy processes as cores, a spinning thread
keeps the very thread that it waits for off the core. The same training steps run with edgekit's setting and with
libgomp's default, in turn: alone, beside one busy loop, and beside a second training of the same kind.

    python benchmarks/spin.py [--quick] [--json]
"""

import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Annotated

import typer
from common import Row, about_machine, document, publish, start

from edgekit import machine
from edgekit.console import say

OURS = "2000"  # as edgekit/cli.py sets it
LOOP = "while True: pass"
STEPS = """
import sys, time, torch
from edgekit import models
from edgekit.methods.inner import Inner
from edgekit.methods.sat import sat
from edgekit.recipe import Student
torch.set_num_threads(int(sys.argv[1])), torch.set_flush_denormal(True)
student = models.build(
    Student(architecture="mobilenetv2", width=0.5, strides=(2, 1, 2, 2, 1, 2, 1)),
    list("0123456789"), (3, 32, 32), [0.5] * 3, [0.25] * 3,
).to(memory_format=torch.channels_last)
images = torch.rand(64, 3, 32, 32).contiguous(memory_format=torch.channels_last)
labels, seeds, inner = torch.arange(64) % 10, torch.arange(64), Inner(8 / 255, 5 / 255, 2)
end, count = time.perf_counter() + 2, 0
while True:
    sat(student, None, images, labels, inner=inner, seeds=seeds).mean().backward()
    now = time.perf_counter()
    if now < end:  # warm-up
        begin, count = now, 0
        continue
    count += 1
    if now >= end + float(sys.argv[2]):
        break
print(64 * count / (now - begin))
"""


def training(spin: str | None, seconds: float) -> subprocess.Popen[str]:
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {key: value for key, value in os.environ.items() if key not in names}
    if spin:
        environment["GOMP_SPINCOUNT"] = spin
    command = [sys.executable, "-c", STEPS, str(machine.cores()), str(seconds)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def speed(process: subprocess.Popen[str]) -> float:
    """images/s that a training printed."""
    out, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the training ended with {process.returncode}")
    return float(out)


@contextlib.contextmanager
def neighbour(kind: str, spin: str | None, seconds: float) -> Iterator[None]:
    busy = None
    if kind == "a busy loop":
        busy = subprocess.Popen([sys.executable, "-c", LOOP])
    elif kind == "a second training":
        busy = training(spin, seconds + 30)  # outlives the measured one
    try:
        if busy:
            time.sleep(1)
        yield
    finally:
        if busy:
            busy.kill()
            busy.communicate()


def main(
    quick: Annotated[bool, typer.Option("--quick", help="One short round.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; each measures both settings beside every neighbour.")] = 5,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """images/s of adversarial training with edgekit's GOMP_SPINCOUNT against libgomp's default."""
    seconds = 3.0 if quick else 8.0
    found: dict[str, dict[str, list[float]]] = {}
    for count in range(1 if quick else rounds):
        for kind in ("nobody", "a busy loop", "a second training"):
            settings = [("ours", OURS), ("default", None)]
            for name, spin in settings if count % 2 == 0 else settings[::-1]:
                with neighbour(kind, spin, seconds):
                    value = speed(training(spin, seconds))
                found.setdefault(kind, {}).setdefault(name, []).append(value)
                say(f"beside {kind}, {name}: {value:.0f} images/s")
    rows = []
    for kind, values in found.items():
        ours, theirs = (statistics.median(values[name]) for name in ("ours", "default"))
        what = f"SAT step, {machine.cores()} threads, beside {kind}, median of {len(values['ours'])}"
        rows.append(Row(what, ours, theirs, "libgomp's default", ours / theirs, None, "images/s"))
    publish(document("spin", rows, about_machine(threads=machine.cores()), quick=quick, found=found), as_json=json)


if __name__ == "__main__":
    start(main)
