"""`python -m edgekit.judge.cold FILE`: a cold start, timed from within a process that has done nothing before.

It imports the file's runtime, opens the file, answers one random image and then one batch, and prints one line of JSON:
{"seconds": of opening and the first answer, "memory": [bytes after that answer, after the batch]}, the memory being
the most that was resident beyond what the process had with the runtime imported and no file open.
"""

import argparse
import contextlib
import json
import os
import resource
import sys
import time
from pathlib import Path

import numpy

from edgekit.errors import BAD_INPUT, EdgekitError
from edgekit.judge.child import add_arguments, opened, sentence

_STATUS = Path("/proc/self/status")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m edgekit.judge.cold", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--shape", required=True, help="of one image as the file takes it, such as 3,32,32")
    parser.add_argument("--batch", type=int, required=True, help="the number of images after the first")
    arguments = parser.parse_args()
    answers = os.dup(1)
    os.dup2(2, 1)  # what a runtime prints must not get among the figures
    try:
        shape = [int(size) for size in arguments.shape.split(",")]
        one, many = (numpy.random.default_rng(0).random((n, *shape), "float32") for n in (1, arguments.batch))
        _import(arguments.format)
        before = _forgotten()
        begin = time.perf_counter()
        scores, _ = opened(arguments)
        scores(one)
        seconds, first = time.perf_counter() - begin, peak()
        scores(many)
        measured = {"seconds": seconds, "memory": [first - before, peak() - before]}
    except EdgekitError as error:
        error.where = None  # the parent names the file
        _leave(str(error), error.exit_code)
    except Exception as error:  # whatever a runtime raises: its classes have no common base but this
        _leave(sentence(error), BAD_INPUT)
    else:
        os.write(answers, json.dumps(measured).encode())
    # Past the destructors of the runtime: nobody waits for them, and some of them crash.
    os._exit(0)


def peak() -> int:
    """The most bytes that were resident in this process so far.

    Where there is /proc not from getrusage: Linux starts its ru_maxrss with the parent's peak, even through exec.
    """
    if _STATUS.is_file():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _forgotten() -> int:
    """`peak` with what the imports needed for a moment forgotten, where the system lets a process forget it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak()


def _import(format: str | None) -> None:
    if format == "torchscript":
        from edgekit.formats import torchscript  # noqa: F401
    elif format in ("openvino", "executorch", "ncnn", "tensorrt", "coreml"):
        from edgekit.formats import FORMATS

        FORMATS[format].package()
    elif format == "litert":
        import ai_edge_litert.interpreter  # noqa: F401  # pyright: ignore

        from edgekit import lite  # noqa: F401
    else:
        import onnxruntime  # noqa: F401

        from edgekit import ort  # noqa: F401


def _leave(what: str, status: int) -> None:
    os.write(2, f"\n{' '.join(what.split())}\n".encode())
    os._exit(status)


if __name__ == "__main__":
    main()
