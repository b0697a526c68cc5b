"""export/*.toml -> a validated, frozen Target: the place that a file is for, and what it may cost there.

A budget of size is checked of every file. A budget of latency is one on its device: it is checked here only where the
profile says that it is for a machine like this one (MACHINES), and never under an emulator.
"""

import importlib.metadata
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

import edgekit
from edgekit import machine, shipped
from edgekit.errors import EdgekitError, nearest
from edgekit.recipe import Table, parse, sentence

SCHEMA = 1
FOLDER = "export"
ROUNDS, FEWEST, SECONDS = 50, 15, 5.0  # inferences of which the median is taken; fewer once so much time is spent


def _x86(vendors: Sequence[str]) -> bool:
    # The vendors' own names: neither Rosetta nor QEMU's user mode on another processor shows one, its "TCG" model may.
    return machine.family() == "x86" and machine.vendor() in vendors and "TCG" not in machine.processor()


def _nvidia() -> bool:
    import torch

    return torch.cuda.is_available()


# What a latency can be measured on: whether this machine is such a one.
MACHINES: dict[str, Callable[[], bool]] = {
    "device": lambda: False,  # the place itself, which is never the machine that exports
    "x86": lambda: _x86(("GenuineIntel", "AuthenticAMD")),
    "intel": lambda: _x86(("GenuineIntel",)),
    "nvidia": _nvidia,
}


class Budget(Table):
    megabytes: float = Field(gt=0)  # 10^6 bytes of all that ships
    milliseconds: float = Field(gt=0)  # median of one inference of `batch` images
    machine: Literal["device", "x86", "intel", "nvidia"] = "device"  # what these milliseconds are for


class Target(Table):
    """One place to ship to. `name` is the file's, and no key of it."""

    name: str = Field(pattern=r"^[A-Za-z0-9._]+(-[A-Za-z0-9._]+)*$")  # a part of folder names
    place: str = Field(min_length=1)  # for people: the device and its operating system
    format: str
    precision: Literal["fp32", "fp16", "int8"]
    scheme: str | None = None  # of int8 files: how the format's runtime wants its integers (quantize/scheme.py)
    layout: Literal["NCHW", "NHWC"] = "NCHW"  # of the images that the file takes
    threads: int = Field(default=1, ge=1)  # of one inference
    batch: int = Field(default=1, ge=1)  # images of one inference
    runtime: str = Field(pattern=r"^[A-Za-z][\w.-]*(>=|==)\d+(\.\d+)*$")  # on the device: "onnxruntime>=1.18"
    budget: Budget

    def record(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True)

    @model_validator(mode="after")
    def _integers(self) -> "Target":
        if (self.scheme is None) == (self.precision == "int8"):
            raise ValueError("should have the key 'scheme' where its precision is int8, and only there")
        return self


def read(name: str) -> Target:
    """The profile that `--target NAME` means: a path ending in .toml, else export/NAME.toml, here or as shipped.

    Raises:
        EdgekitError: there is none, it is not TOML, or a key is unknown, of the wrong type or out of range.
    """
    if name.endswith(".toml"):
        path = name
    elif (path := f"{FOLDER}/{name}.toml") not in (known := files()):
        mend = nearest(name, [Path(one).stem for one in known])
        raise EdgekitError(f"there is no target '{name}'", where=f"--target {name}", mend=mend)
    text, document = parse(shipped.find(path, FOLDER), path)
    if "name" in document:
        raise EdgekitError("the target has no key 'name'", where=path, mend="It is named as its file is")
    try:
        return Target.model_validate({**document, "name": Path(path).stem})
    except ValidationError as error:
        raise sentence(error, path, text, {("name",): path}, Target, "target") from None


def files() -> list[str]:
    """The profiles that can be named, those of the working directory too: "export/browser.toml"."""
    here = [path.as_posix() for path in Path(FOLDER).glob("*.toml") if path.is_file()]
    return sorted({*here, *(name for name in shipped.names(FOLDER) if name.count("/") == 1)})


def listed() -> list[Target]:
    """Every profile that can be named."""
    return [read(Path(path).stem) for path in files()]


def document() -> dict[str, Any]:
    """What `edgekit targets --json` prints (schemas/targets.json)."""
    return {"schema": SCHEMA, "edgekit": edgekit.__version__, "targets": [one.record() for one in listed()]}


def rows(document: Mapping[str, Any]) -> list[dict[str, str]]:
    """The same as a table."""
    return [
        {
            "target": one["name"],
            "place": one["place"],
            "file": f"{one['format']}-{one['precision']}",
            "scheme": one.get("scheme", "–"),
            "input": f"{one['batch']} x {one['layout']}",
            "threads": str(one["threads"]),
            "size": f"{one['budget']['megabytes']:g} MB",
            "latency": f"{one['budget']['milliseconds']:g} ms",
            "runtime": one["runtime"],
        }
        for one in document["targets"]
    ]


# Budgets --------------------------------------------------------------------------------------------------------------


def measure(target: Target, size: int, infer: Callable[[], object]) -> dict[str, Any]:
    """What artifact.json's `target` says: the profile, and what its budget came to.

    Args:
        size: bytes of all that ships.
        infer: one inference of the target's batch with its threads in the format's runtime here; called only where the
            budget of latency is for a machine like this one.
    """
    limit = round(1e6 * target.budget.megabytes)
    latency: dict[str, Any] = {"limit": target.budget.milliseconds / 1000}
    if why := _elsewhere(target):
        latency["why"] = why
    else:
        (times,) = machine.turns([infer], ROUNDS, warm_up=5, fewest=FEWEST, seconds=SECONDS)
        seconds = statistics.median(times)
        on = machine.processor() if target.budget.machine != "nvidia" else _gpu()
        latency |= {"seconds": seconds, "on": on, "held": seconds <= latency["limit"]}
    return {
        "profile": target.record(),
        "runtime_here": _runtime_here(target),
        "size": {"limit": limit, "bytes": size, "held": size <= limit},
        "latency": latency,
    }


def _elsewhere(target: Target) -> str | None:
    """Why the latency is not measured on this machine; None where it is."""
    if target.budget.machine == "device":
        return "it is measured by the runner on the device"
    if not MACHINES[target.budget.machine]():
        return f"this machine is not one of the kind '{target.budget.machine}', which it is for"
    if target.threads > machine.cores():
        return f"it is for {target.threads} threads, and there are {machine.cores()} cores"
    return None


def _gpu() -> str:
    import torch

    return torch.cuda.get_device_name()


def _runtime_here(target: Target) -> str | None:
    """The version of the target's runtime that is installed here, if it is."""
    try:
        return importlib.metadata.version(_runtime(target.runtime)[0])
    except importlib.metadata.PackageNotFoundError:
        return None


def _runtime(text: str) -> tuple[str, str, tuple[int, ...]]:
    """ "onnxruntime>=1.18" -> ("onnxruntime", ">=", (1, 18))."""
    name, sign, version = re.split("(>=|==)", text)
    return name, sign, tuple(map(int, version.split(".")))


def held(record: Mapping[str, Any]) -> bool:
    """Whether no budget was missed, of artifact.json's `target`; one that was not checked was not missed."""
    return record["size"]["held"] and record["latency"].get("held", True)


def sentences(record: Mapping[str, Any]) -> Iterator[str]:
    """What is to be said of a budget, one line each."""
    profile, size, latency = record["profile"], record["size"], record["latency"]
    budget = f"the budget of {profile['name']}"
    word = "within" if size["held"] else "MISSED: more than"
    yield f"{size['bytes'] / 1e6:.3g} MB, {word} {budget}, {size['limit'] / 1e6:g} MB"
    allowed = f"{1000 * latency['limit']:g} ms"
    if "why" in latency:
        yield f"latency: {budget}, {allowed}, is not checked here: {latency['why']}"
    else:
        word = "within" if latency["held"] else "MISSED: more than"
        setting = f"batch {profile['batch']}, {profile['threads']} thread{'s' * (profile['threads'] > 1)}"
        yield f"{1000 * latency['seconds']:.3g} ms ({setting}, {latency['on']}), {word} {budget}, {allowed}"
    here = record["runtime_here"]
    if here is None:
        yield f"the target's {profile['runtime']} is not installed here: that the file runs in it was not tried"
    elif not _satisfies(here, profile["runtime"]):
        yield f"compared with the student in version {here}, which is not the target's {profile['runtime']}"


def _satisfies(version: str, runtime: str) -> bool:
    _, sign, asked = _runtime(runtime)
    found = tuple(map(int, re.findall(r"\d+", version)[: len(asked)]))
    return found >= asked if sign == ">=" else found == asked
