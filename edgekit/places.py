"""Where a file is judged beside this machine's own kernels: what was asked for, or the other 8-bit arithmetic.

Where nothing was asked, an int8 file whose pair sums can saturate is judged under both arithmetics at least.
"""

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from edgekit import judge, machine, ort, processors, twin
from edgekit.classifier import Classifier, Wrapped
from edgekit.console import say
from edgekit.errors import EdgekitError
from edgekit.examine import Other

EXACT, CLIPPING = "exact", "clipping"
BATCH = 50  # images whose clipped sums are computed at once: their columns are large

Wrap = Callable[[Classifier], Classifier]  # a runtime as it eats -> a Classifier of images in [0, 1]


def asked_for(
    names: Sequence[str], path: Path, format: str, wrap: Wrap, output: str | None = None
) -> tuple[Other, ...]:
    """The processors of --on beside this machine."""
    others = [name for name in names if name != processors.NATIVE]
    if format != "onnx":
        why = f"no runtime for {format} is emulated; it says nothing of an ONNX file, which can be judged alone"
        return tuple(Other(name, format, None, why) for name in others)

    def opener(name: str) -> Callable[[], Classifier]:
        return lambda: wrap(judge.start_on(name, path, output=output))

    return tuple(Other(name, processors.runtime(name), opener(name)) for name in others)


def both_arithmetics(
    path: Path, wrap: Wrap, output: str | None = None, threads: int | None = None
) -> tuple[Other, ...]:
    """The arithmetic that this machine does not have, for a file whose pair sums can saturate.

    Empty, and said so, where nothing here computes it.
    """
    clips = not machine.saturates()
    if not clips:
        precise = partial(judge.open, path, threads=threads, options=ort.PRECISE, output=output)
        with contextlib.suppress(EdgekitError):  # ONNX Runtime 1.32 fails so on some files, whose copy is then asked
            first = [precise()]
            runtime = f"{judge.runtime('onnx')}, session.x64quantprecision=1"
            return (Other(EXACT, runtime, lambda: wrap(first.pop() if first else precise())),)
    try:
        copy = twin.open(path, output, clips=clips)
        if copy.before_softmax is not None:
            raise EdgekitError(f"it ends in {copy.before_softmax}, which the copy leaves out", where=path)
    except EdgekitError as error:
        name = "x86-avx2" if clips else "x86-sse"
        mend = f"{processors.command([name])}, then say --on {name}"
        say(f"{error}: x86 {'without' if clips else 'with'} VNNI can answer otherwise and is not judged. Run: {mend}")
        return ()

    @torch.no_grad()
    def answer(images: Tensor) -> Tensor:
        return torch.cat([copy(part) for part in images.split(BATCH)])

    runtime = "sums that clip at 16 bits, as on x86 without VNNI" if clips else "exact sums"
    return (
        Other(
            CLIPPING if clips else EXACT,
            f"{runtime}, computed in torch",
            lambda: wrap(Wrapped(answer, differentiable=False)),
        ),
    )
