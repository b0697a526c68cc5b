"""A file, an address or a command line -> the judge that answers for it."""

import math
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from edgekit import processors
from edgekit.artifact import JUDGED, Artifact
from edgekit.classifier import Classifier, Wrapped
from edgekit.errors import ENVIRONMENT, EdgekitError, choose
from edgekit.formats import FORMATS, lacking
from edgekit.judge.child import CODE, OPENING, SUFFIXES
from edgekit.judge.line import dialled, started
from edgekit.judge.remote import Remote

RUNTIMES: dict[str, str] = {name: format.RUNTIME for name, format in FORMATS.items()}
SECONDS = 120.0  # for one batch: an emulated processor takes seconds where this one takes milliseconds
EMULATED, AT_ONCE = 600.0, 25  # the same where a processor is emulated, for at most so many images
_SCHEME = "tcp://"
_ROOT = Path(__file__).parents[2]


def open(
    what: Artifact | str | Path,
    *,
    threads: int | None = None,
    isolated: bool = True,
    options: Mapping[str, str] | None = None,
    optimization: str = "all",
    output: str | None = None,
    trust: bool = False,
    memory: int | None = None,
    seconds: float = SECONDS,
) -> Classifier:
    """A model file as a Classifier: (N, C, H, W) float32 in [0, 1] -> (N, K) float32 scores; no gradients.

    Args:
        what: an artifact, whose digest was checked when it was loaded, or the path of a file.
        threads: of one inference; None is the runtime's own choice.
        isolated: in a child process, which the file may kill; `close` ends it, and so does forgetting the Classifier.
            False is for measuring latency, and for files that are known.
        options, optimization, output: of ONNX Runtime, as in ort.Session.
        trust: open TorchScript or an engine, which can run code of the file; an artifact's needs no leave.
        memory: bytes that the file may take in its child; by default half of this machine's, and at least 2 GiB.
        seconds: that the child may take for one batch; opening the file may always take two minutes.
    Raises:
        EdgekitError: the file is of no known format, or its runtime does not take it or dies of it.
    """
    path, format = (what.path, what.format) if isinstance(what, Artifact) else (Path(what), None)
    trust = trust or isinstance(what, Artifact)
    if isolated:
        return start(
            path,
            format=format,
            threads=threads,
            options=options,
            optimization=optimization,
            output=output,
            trust=trust,
            memory=memory,
            seconds=seconds,
        )
    format = _format(path, format, trust)
    more: dict[str, Any] = {"options": options, "optimization": optimization, "output": output}
    return FORMATS[format].open(path, threads=threads, **(more if format == "onnx" else {}))


def start(
    path: Path,
    *,
    format: str | None = None,
    threads: int | None = None,
    options: Mapping[str, str] | None = None,
    optimization: str = "all",
    output: str | None = None,
    trust: bool = False,
    memory: int | None = None,
    seconds: float = SECONDS,
    interpreter: Sequence[str] = (sys.executable,),
    search: Sequence[str] | None = None,
) -> Remote:
    """The same in a child process that has opened the file.

    Args:
        interpreter: the command that runs Python, such as that of another processor under an emulator. For an ONNX
            file it needs numpy and onnxruntime, no more.
        search: folders where it finds modules, edgekit's aside; by default those of this process.
    Raises:
        EdgekitError: as `open`.
    """
    format = _format(path, format, trust)
    if not path.is_file():
        raise EdgekitError("there is no such file", where=path)
    command = [*interpreter, "-P", "-m", "edgekit.judge.child", str(path.resolve()), "--format", format]
    command += ["--optimization", optimization, "--memory", str(_memory() if memory is None else memory)]
    command += ["--seconds", str(seconds)]
    for key, value in (options or {}).items():
        command += ["--option", f"{key}={value}"]
    for name, setting in {"--threads": threads, "--output": output}.items():
        command += [] if setting is None else [f"{name}={setting}"]
    command += ["--trust-file"] if trust else []
    # The child finds modules where this process does, the working directory excepted: a folder of data may hold any.
    folders = [*filter(None, sys.path if search is None else search), str(_ROOT)]
    try:
        line = started(command, {**os.environ, "PYTHONPATH": os.pathsep.join(folders)})
    except OSError as error:
        what = f"a child process cannot be started ({error.strerror})"
        raise EdgekitError(what, where=interpreter[0], exit_code=ENVIRONMENT) from None
    judge = Remote(line, name=RUNTIMES[format], where=path, seconds=max(seconds, OPENING), own=True)
    judge.wait()
    judge.seconds = seconds
    return judge


def start_on(processor: str, path: Path, *, output: str | None = None, seconds: float = EMULATED) -> Classifier:
    """An ONNX file, judged by another processor's own kernels, emulated: `edgekit.processors`.

    Args:
        processor: one that is set up.    output: as in ort.Session.
        seconds: that it may take for one message of at most AT_ONCE images.
    Raises:
        EdgekitError: its runtime does not take the file or dies of it.
    """
    if processor == "wasm":
        command = [*processors.web(), str(path.resolve()), *([] if output is None else [output])]
        try:
            line = started(command)
        except OSError as error:
            raise EdgekitError(f"node cannot be started ({error.strerror})", exit_code=ENVIRONMENT) from None
        judge = Remote(line, name="onnxruntime-web", where=path, seconds=seconds, own=True)
        judge.wait()
    else:
        interpreter, search = processors.interpreter(processor)
        # No limit of memory: QEMU ignores it, and what its own translations take would count.
        judge = start(
            path,
            format="onnx",
            threads=1,
            output=output,
            memory=0,
            seconds=seconds,
            interpreter=interpreter,
            search=search,
        )
    return Wrapped(lambda images: torch.cat([judge(part) for part in images.split(AT_ONCE)]), differentiable=False)


def connect(address: str, *, seconds: float = SECONDS, longer: str = "Allow more `seconds`") -> Remote:
    """A judge that is a device or a program of somebody else.

    Args:
        address: "tcp://HOST:PORT", or the command line of a program that answers on its stdout.
        seconds: that it may take to read a batch, and then to answer it.
        longer: how a user gives it more, for the sentence that says it took longer.
    Raises:
        EdgekitError: (exit code 4) it cannot be reached or started; (2) the address is none.
    """
    where = f"--judge {address}"
    if address.startswith(_SCHEME):
        host, port = _host(address, where)
        try:
            line = dialled(host, port, min(seconds, 10.0))
        except OSError as error:
            what = f"the judge cannot be reached ({error.strerror or error})"
            raise EdgekitError(what, where=where, mend="Start it first", exit_code=ENVIRONMENT) from None
        return Remote(line, where=where, seconds=seconds, longer=longer)
    try:
        command = shlex.split(address)
    except ValueError as error:
        raise EdgekitError(f"not a command line ({error})", where=where) from None
    if not command or "://" in command[0]:
        raise EdgekitError("not a judge", where=where, mend="Known: tcp://HOST:PORT, or a command line")
    try:
        line = started(command)
    except OSError as error:
        what = f"the judge cannot be started ({error.strerror})"
        raise EdgekitError(what, where=where, exit_code=ENVIRONMENT) from None
    return Remote(line, where=where, seconds=seconds, longer=longer)


def _host(address: str, where: str) -> tuple[str, int]:
    host, _, port = address.removeprefix(_SCHEME).rpartition(":")
    if not host or not (port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
        raise EdgekitError("not an address", where=where, mend="Write tcp://HOST:PORT, such as tcp://127.0.0.1:5000")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _format(path: Path, format: str | None, trust: bool) -> str:
    if format is None and path.suffix not in SUFFIXES:
        raise EdgekitError("no model file that edgekit opens", where=path, mend=f"Known: {', '.join(SUFFIXES)}")
    format = choose(RUNTIMES, format, "format") and format if format else SUFFIXES[path.suffix]
    if format in CODE and not trust:
        raise EdgekitError(
            f"opening {CODE[format]} can run code of the file", where=path, mend="Trust it: --trust-file"
        )
    if (missing := lacking(format)) is not None:
        serving = f"python -m edgekit.judge.serve {JUDGED[format]}" + " --trust-file" * (format in CODE)
        raise EdgekitError(
            f"{RUNTIMES[format]} needs {missing}, which is not here",
            where=path,
            mend=f"Where it runs: {serving}; then say here: --judge tcp://HOST:PORT",
            exit_code=ENVIRONMENT,
        )
    return format


def _memory() -> int:
    """Half of what this machine, or the container that this process is in, has; at least 2 GiB."""
    most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        limit = "max"
    return max(2**31, math.floor(min(most, int(limit) if limit.isdigit() else most) / 2))
