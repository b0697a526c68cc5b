"""`python -m edgekit.judge.child FILE`: opens a model file in its runtime and answers the protocol on stdin and stdout.

A file that kills its runtime kills this process and no other. What goes wrong in a way that can be said is one line on
stderr and exit status 2 or 4. For an ONNX file neither torch nor anything else slow is imported.
"""

import argparse
import contextlib
import os
import re
import resource
import select
import signal
import threading
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from edgekit.errors import BAD_INPUT, EdgekitError, choose, printable
from edgekit.judge import protocol

SUFFIXES = {
    ".onnx": "onnx",
    ".pt": "torchscript",
    ".ptl": "torchscript",
    ".xml": "openvino",
    ".pte": "executorch",
    ".tflite": "litert",
    ".param": "ncnn",
    ".engine": "tensorrt",
    ".mlmodel": "coreml",
}
CODE = {"torchscript": "TorchScript", "tensorrt": "a TensorRT engine"}  # of which code runs when it is opened
OPENING = 120.0  # seconds: on a busy machine the imports alone take several
_THREAD = 2**23 + 2**27  # bytes of address space that glibc sets aside for a thread: its stack and its arena
_MEMORY = re.compile(r"bad.?alloc|allocate|out of memory", re.IGNORECASE)


def main() -> None:
    """Serve one conversation; ends when stdin does."""
    parser = argparse.ArgumentParser(prog="python -m edgekit.judge.child", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--memory", type=int, default=0, help="bytes beyond those of the runtime itself; 0: no limit")
    parser.add_argument("--seconds", type=float, default=0, help="for one batch; 0: no limit")
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    # What a runtime prints must not get among the scores.
    answers = os.dup(1)
    os.dup2(2, 1)
    _first_to_go()
    threading.Thread(target=_end_with_the_parent, args=(os.getppid(),), daemon=True).start()
    try:
        with limit(max(arguments.seconds, OPENING) if arguments.seconds else 0):
            scores, classes = opened(arguments)
        protocol.serve(
            FileIO(0), FileIO(answers, "wb"), scores, classes=classes, working=lambda: limit(arguments.seconds)
        )
    except (BrokenPipeError, ConnectionResetError):
        pass
    except EdgekitError as error:
        error.where = None  # the parent names the file
        _leave(_memory(str(error), arguments.memory) or str(error), error.exit_code)
    except Exception as error:  # whatever a runtime raises: its classes have no common base but this
        _leave(sentence(error, arguments.memory), BAD_INPUT)
    # Past the destructors of the runtime: nobody waits for them, and some of them crash.
    os._exit(0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What says which file is opened and how; `serve.py` takes the same."""
    parser.add_argument("file", type=Path)
    parser.add_argument("--format", choices=sorted(set(SUFFIXES.values())), help="by default what the suffix says")
    parser.add_argument("--threads", type=int, help="of one inference; by default the runtime's own choice")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="ONNX Runtime session entry")
    parser.add_argument("--optimization", default="all", help="of the graph: none, basic, extended or all")
    parser.add_argument("--output", help="the output that holds the scores; the first by default")
    parser.add_argument("--trust-file", action="store_true", help="open TorchScript or an engine, which are code")


def opened(arguments: argparse.Namespace) -> tuple[protocol.Scores, int]:
    """The file that the arguments name, and its number of classes, 0 where the file does not say.

    Raises:
        EdgekitError: the file is of no known format, not trusted, or refused by its runtime.
    """
    path: Path = arguments.file
    name = arguments.format or choose(SUFFIXES, path.suffix, "model file with the suffix", where=path)
    memory = getattr(arguments, "memory", 0)
    if name in CODE and not arguments.trust_file:
        raise EdgekitError(f"opening {CODE[name]} can run code of the file", where=path, mend="Trust it: --trust-file")
    if name == "torchscript":
        import torch

        from edgekit.formats import torchscript

        if arguments.threads:
            torch.set_num_threads(arguments.threads)
        _limit_memory(memory, arguments.threads)
        module = torchscript.open(path, output=arguments.output)
        return lambda pixels: module(torch.from_numpy(pixels)).numpy(), 0
    if name in ("openvino", "executorch", "ncnn"):
        import torch

        from edgekit.formats import FORMATS

        FORMATS[name].package()  # before the limit
        _limit_memory(memory, arguments.threads)
        opened = FORMATS[name].open(path, threads=arguments.threads)
        return lambda pixels: opened(torch.from_numpy(pixels)).numpy(), 0
    if name == "litert":
        import ai_edge_litert.interpreter  # noqa: F401  # pyright: ignore (before the limit)

        from edgekit import lite

        _limit_memory(memory, arguments.threads)
        interpreter = lite.Session(path, threads=arguments.threads)
        return interpreter, interpreter.classes
    if name in ("tensorrt", "coreml"):
        import torch

        from edgekit.formats import FORMATS

        # No limit of memory: CUDA and Core ML set aside far more addresses than they use.
        foreign = FORMATS[name].open(path, threads=arguments.threads)
        return lambda pixels: foreign(torch.from_numpy(pixels)).numpy(), 0
    import onnxruntime  # noqa: F401 (before the limit: it counts what comes beyond)

    from edgekit import ort

    _limit_memory(memory, arguments.threads)
    options = dict(entry.split("=", 1) for entry in arguments.option)
    session = ort.Session(
        path,
        threads=arguments.threads,
        options=options,
        optimization=arguments.optimization,
        output=arguments.output,
    )
    return session, session.classes


def sentence(error: Exception, memory: int = 0) -> str:
    """What a runtime raised, in one line."""
    if isinstance(error, MemoryError):
        return _memory("out of memory", memory) or "its runtime is out of memory"
    said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
    return _memory(str(error), memory) or f"its runtime fails ({printable(said)})"


def _memory(said: str, memory: int) -> str | None:
    """The sentence for a runtime that was refused memory, where that is what it said."""
    if not memory or not _MEMORY.search(said):
        return None
    return f"needs more memory than the {memory / 2**30:.2g} GiB that it may take. Allow more `memory`"


@contextlib.contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Let the kernel end this process after so long, whatever native code it is in and even if the parent is gone.

    The parent, who counts the same seconds, comes first and says so.
    """
    signal.setitimer(signal.ITIMER_REAL, seconds + 5 if seconds else 0)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)


def _limit_memory(memory: int, threads: int | None) -> None:
    """Let the address space grow by `memory` bytes from here on, beside what the runtime's threads set aside."""
    statm = Path("/proc/self/statm")
    if not memory or not statm.is_file():
        return
    now = int(statm.read_text().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = now + memory + (threads or os.cpu_count() or 1) * _THREAD
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))


def _first_to_go() -> None:
    """Where the machine's memory runs out, let the kernel end this process and not the parent."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _end_with_the_parent(parent: int) -> None:
    """End this process once its input's other end is closed, even while the runtime is at work.

    PR_SET_PDEATHSIG would do it too soon: it watches the thread that started the child, not the process.
    """
    poll = select.poll()
    poll.register(0, 0)  # no event but the hang-up, which is always reported
    while not poll.poll(1000) and os.getppid() == parent:
        pass
    # A main thread that saw the end as well gets the time to leave in order.
    threading.Event().wait(0.5)
    os._exit(0)


def _leave(what: str, status: int) -> None:
    os.write(2, f"\n{' '.join(what.split())}\n".encode())
    os._exit(status)


if __name__ == "__main__":
    main()
