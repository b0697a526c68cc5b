"""What works on this machine, tried and not merely looked up, and the command that mends what does not.

Nothing here imports torch or a runtime: packages, formats, the GPU and emulated processors are tried in child
processes (trial.py), which they may hang or kill. Nothing is installed or downloaded.
"""

import concurrent.futures
import contextlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import edgekit
from edgekit import machine, processors, shipped
from edgekit.artifact import JUDGED
from edgekit.console import progress
from edgekit.files import cache_folder
from edgekit.runs import ROOT

SCHEMA = 1
YES, NO, NOT_NEEDED = "yes", "no", "not needed"
SECONDS = 120.0  # for one child: on a busy machine with a cold disk the imports alone take half of that
AT_ONCE = 2  # children; each is as large as torch
DISK = 2**30  # bytes: a run of photos, its cache and its artifacts fit
MEMORY = 2**31  # bytes: what a judge's child may always take (judge/opening.py)
_WRITTEN = 2**20  # bytes, written and removed again to see that a folder takes them
_CORE = ("onnx", "torchscript")  # formats that come without an extra
_SHOWN = ("torch", "onnx", "onnxruntime")  # packages with a row of their own, whatever their state
_REQUIREMENT = re.compile(r"([\w.-]+)>=([\d.]+)")
_HERE = Path(edgekit.__file__).parent


@dataclass(frozen=True)
class Row:
    """One thing that edgekit may need.

    Attributes:
        group, what: where it belongs, and its name.    works: YES, NO or NOT_NEEDED.
        needed: by distill, export or verify without further options.
        found: what is there, or why it does not work.    mend: what makes it work, mostly a command.
    """

    group: str
    what: str
    works: str
    needed: bool
    found: str
    mend: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of a trial: `found` where it works, else `fault` and, where one is known, its `mend`."""

    found: str | None
    fault: str = ""
    mend: str | None = None

    def row(self, group: str, what: str, *, needed: bool, mend: str | None = None) -> Row:
        if self.found is not None:
            return Row(group, what, YES, needed, self.found)
        return Row(group, what, NO, needed, self.fault, self.mend or mend)


def examine() -> dict[str, Any]:
    """Try all of it.

    Returns:
        {"schema", "edgekit", "works", "seconds", "rows": [Row…]}, as schemas/doctor.json says; `works` is False where
        a row does not work that distill, export or verify need.
    """
    begin = time.monotonic()
    floors = requirements()
    formats = [f"format:{name}" for name in JUDGED]
    others = [f"processor:{name}" for name in processors.EMULATED]
    packages = [f"package:{name}" for name in floors]
    outcomes = ask([[*packages, "digits"], ["gpu", *formats], others])
    rows = [
        python(),
        *versions(floors, outcomes),
        *processor(),
        memory(),
        *disks(),
        gpu(outcomes["gpu"]),
        *(written(name, outcomes[f"format:{name}"], floors) for name in JUDGED),
        *(emulated(name, outcomes[f"processor:{name}"]) for name in processors.EMULATED),
        *datasets(outcomes["digits"]),
    ]
    return {
        "schema": SCHEMA,
        "edgekit": edgekit.__version__,
        "works": not any(row.needed and row.works == NO for row in rows),
        "seconds": round(time.monotonic() - begin, 1),
        "rows": [asdict(row) for row in rows],
    }


# Rows -----------------------------------------------------------------------------------------------------------------


def python() -> Row:
    """This Python against the one that edgekit asks for."""
    least = _project()["requires-python"]
    found = f"{sys.version.split()[0]}, {sys.executable}"
    if sys.version_info[:2] < _release(least):
        return Row("core", "python", NO, True, f"{found}; it takes {least}", f"Use a Python {least}")
    return Row("core", "python", YES, True, found)


def versions(floors: Mapping[str, str], outcomes: Mapping[str, Outcome]) -> list[Row]:
    """A row for each of _SHOWN and for each package with a fault; one for all the others."""
    rows = {name: _package(name, least, outcomes[f"package:{name}"]) for name, least in floors.items()}
    shown = [row for name, row in rows.items() if name in _SHOWN or row.works == NO]
    rest = [f"{name} {row.found}" for name, row in rows.items() if row not in shown]
    return [*shown, Row("core", f"{len(rest)} others", YES, True, ", ".join(rest))]


def _package(name: str, least: str, outcome: Outcome) -> Row:
    install = f"pip install '{name}>={least}'"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Row("core", name, NO, True, "not installed", install)
    if _release(version) < _release(least):
        return Row("core", name, NO, True, f"{version} is too old; edgekit takes {least} or newer", install)
    again = f"pip install --force-reinstall '{name}>={least}'"
    if outcome.found is None:
        return Row("core", name, NO, True, f"{version} does not load: {outcome.fault}", again)
    return Row("core", name, YES, True, version)


def requirements() -> dict[str, str]:
    """The packages of the core and the oldest version of each that edgekit takes."""
    found = (_REQUIREMENT.fullmatch(one.replace(" ", "")) for one in _project()["dependencies"])
    return {match[1]: match[2] for match in found if match is not None}


def _project() -> dict[str, Any]:
    """`requires-python` and `dependencies` of pyproject.toml, which in a wheel are its metadata."""
    path = _HERE.parent / "pyproject.toml"
    if path.is_file():
        return tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    needs = importlib.metadata.requires("edgekit") or []
    about = importlib.metadata.metadata("edgekit")
    return {"requires-python": about["Requires-Python"], "dependencies": [one for one in needs if ";" not in one]}


def _release(version: str) -> tuple[int, ...]:
    """ "2.14.1+cu130" or ">=2.14.1" -> (2, 14, 1)."""
    found = re.search(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def processor() -> list[Row]:
    """The processor, and how it sums 8-bit products."""
    sets = ", ".join(machine.instructions()) or "no instructions for them that edgekit knows"
    if machine.saturates():
        said = f"{sets}: pairs are summed in 16 bits, which clips; edgekit's int8 files never reach that"
    else:
        said = f"{sets}: sums do not clip"
    cores = machine.cores()
    found = f"{machine.processor()}, {machine.family()}, {cores} {'core' if cores == 1 else 'cores'}"
    return [
        Row("machine", "processor", YES, True, found),
        Row("machine", "8-bit products", YES, True, said),
    ]


def memory() -> Row:
    total, free = machine.memory()
    found = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    if free < MEMORY:
        mend = f"End other programs, or give this machine or container {MEMORY / 2**30:.0f} GiB more"
        return Row("machine", "memory", NO, True, found, mend)
    return Row("machine", "memory", YES, True, found)


def disks() -> list[Row]:
    """The folders that are written to."""
    return [
        _disk("run folder", ROOT.absolute, "Work in another folder, or say --run DIR"),
        _disk("cache folder", cache_folder, "export EDGEKIT_CACHE=DIR"),
        _disk("temporary files", lambda: Path(tempfile.gettempdir()), "export TMPDIR=DIR"),
    ]


def _disk(what: str, where: Callable[[], Path], mend: str) -> Row:
    """Whether the folder, or where it will be made, takes a file and has room."""
    mend, place = f"Free space, or: {mend}", None
    try:
        folder = where()
        place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(_WRITTEN))
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(place).free
    except OSError as error:
        return Row("machine", what, NO, True, f"{error.strerror or error}, {place or what}", mend)
    found = f"{free / 2**30:.1f} GiB free, {folder}"
    return Row("machine", what, NO if free < DISK else YES, True, found, mend if free < DISK else None)


def gpu(outcome: Outcome) -> Row:
    """No GPU is no fault: one that cannot be used is."""
    if outcome.found == "":
        return Row("machine", "gpu", NOT_NEEDED, False, "none that torch computes on; the processor does all")
    return outcome.row("machine", "gpu", needed=False, mend="See what nvidia-smi says; --device cpu does without")


def written(name: str, outcome: Outcome, floors: Mapping[str, str]) -> Row:
    """A format that this version writes; what comes without an extra is needed."""
    packages = ("onnx", "onnxruntime", "onnxscript") if name == "onnx" else ("torch",)
    again = " ".join(["pip install --force-reinstall", *(f"'{one}>={floors[one]}'" for one in packages)])
    mend = again if name in _CORE else f"pip install 'edgekit[{name}]'"
    return outcome.row("formats", name, needed=name in _CORE, mend=mend)


def emulated(name: str, outcome: Outcome) -> Row:
    """A processor of --on, which is started where it was set up."""
    return outcome.row("emulated", name, needed=False, mend=f"Once its fault is found: {processors.command([name])}")


def datasets(digits: Outcome) -> list[Row]:
    """What the recipes that ship are about."""
    named = set()
    for recipe in shipped.names("recipes"):
        named.add(tomllib.loads(shipped.find(recipe, "recipes").read_text(encoding="utf-8"))["data"]["name"])
    rows = [digits.row("data", "digits", needed=True, mend="pip install --force-reinstall scikit-learn")]
    for name in sorted(named - {"digits"}):
        folder = cache_folder() / "downloads"
        if any(folder.glob(f"{name.replace('cifar', 'cifar-')}-*")):
            rows.append(Row("data", name, YES, False, str(folder)))
        else:
            found = f"not in {folder}; torchvision fetches it when a recipe with it is first run"
            rows.append(Row("data", name, NOT_NEEDED, False, found, "A copy of yours: --set data.root=DIR"))
    return rows


# Children -------------------------------------------------------------------------------------------------------------


class _Children:
    """Those that are running, and whether further ones may be started."""

    def __init__(self) -> None:
        self.running: set[subprocess.Popen[str]] = set()
        self.over = False

    def end(self) -> None:
        self.over = True
        for child in list(self.running):
            _kill(child)


def ask(lists: Sequence[Sequence[str]]) -> dict[str, Outcome]:
    """What came of every word, each list tried by a child process of its own.

    A word at which the child ends or hangs has that as its fault; the words after it are tried by another child.
    """
    children, outcomes = _Children(), {}
    pool = concurrent.futures.ThreadPoolExecutor(AT_ONCE)
    with progress() as bar:
        task = bar.add_task("trying", total=sum(map(len, lists)), note="")
        try:
            for done in concurrent.futures.as_completed([pool.submit(_ask, words, children) for words in lists]):
                outcomes |= done.result()
                bar.update(task, completed=len(outcomes))
        finally:  # also where the user has had enough
            pool.shutdown(wait=False, cancel_futures=True)
            children.end()
    return outcomes


def _ask(words: Sequence[str], children: _Children) -> dict[str, Outcome]:
    outcomes: dict[str, Outcome] = {}
    left = list(words)
    while left and not children.over:
        lines, ended = _child(left, children)
        for line in lines:
            outcomes[line["trial"]] = Outcome(line.get("found"), line.get("fault", ""), line.get("mend"))
        left = left[len(lines) :]
        if left:  # it answers in order: at the next one it came to its end
            outcomes[left.pop(0)] = Outcome(None, ended)
    return outcomes


def _child(words: Sequence[str], children: _Children) -> tuple[list[dict[str, Any]], str]:
    """The answers of one child, and how it came to its end where some are missing."""
    # It finds modules where this process does, the working directory excepted (-P).
    folders = os.pathsep.join([*filter(None, sys.path), str(_HERE.parent)])
    try:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "edgekit.trial", *words],
            env={**os.environ, "PYTHONPATH": folders},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            process_group=0,  # so that what it starts can be ended with it
        )
    except OSError as error:
        return [], f"no process can be started to try it ({error.strerror})"
    children.running.add(child)
    if children.over:  # the end came in between
        _kill(child)
    late = False
    try:
        said, complaints = child.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        late = True
        _kill(child)
        said, complaints = child.communicate()
    finally:
        children.running.discard(child)
    return [json.loads(line) for line in said.splitlines()], _ending(child.returncode, complaints, late)


def _ending(status: int, complaints: str, late: bool) -> str:
    if late:
        return f"it gives no answer within {SECONDS:g} seconds"
    if status < 0:
        return f"it ends its process ({signal.Signals(-status).name})"
    lines = [line.strip() for line in complaints.splitlines() if line.strip()]
    return f"it ends its process with status {status}" + (f" ({lines[-1][:200]})" if lines else "")


def _kill(child: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
