"""How fast, how large and how hungry exported files are on this machine, in their own runtimes: `edgekit bench`.

What runs is what export wrote, in this process and with no pipe between, as an app would run it. All files take turns,
in another order each round, so that a machine that drifts slows all of them alike (machine.turns). ONNX Runtime's
threads do not spin between inferences here: they would take the cores from whichever file is next.
"""

import contextlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress, TaskID
from torch import Tensor

from edgekit import __version__, judge, machine
from edgekit.console import progress, say
from edgekit.errors import BAD_INPUT, ENVIRONMENT, EdgekitError
from edgekit.files import write_json
from edgekit.foreign import utf8
from edgekit.formats import FORMATS, describe, lacking
from edgekit.judge.child import CODE
from edgekit.lineup import Contender, Judged, Setting, contenders, judged
from edgekit.report import pareto
from edgekit.statistics import front, nearest_rank
from edgekit.verdict import to_dict

SCHEMA = 1
OWN = Path("edgekit-bench")  # what is kept of files that belong to no run
FILE = "bench.json"
ROUNDS, WARM_UP = 200, 5  # TorchScript looks at its first answers and then compiles
FEWEST, PATIENCE = 30, 5.0  # rounds at least; seconds for one file, batch and number of threads, once these are done
COLD = 5  # processes that are started for each file
_ROOT = Path(__file__).parents[1]
_CHILD = 600.0  # seconds

Step = Callable[..., None]  # of a note on what was done, and how many rounds or processes that was


def bench(
    what: str | Path | Sequence[str | Path] | None = None,
    *,
    batch: int = 32,
    threads: int | str | Sequence[int] | None = None,
    rounds: int = ROUNDS,
) -> dict[str, Any]:
    """Measure exported files on this machine: latency, throughput, cold start, memory, size, operators.

    Args:
        what: artifact folders, run folders, ONNX files, one or several, also of several runs; every artifact of the
            latest run by default.
        batch: the number of images that are also measured together, beside one alone.
        threads: of one inference, also as "1,4"; by default 1, 2, 4 and so on, and all cores.
        rounds: of each file, batch and number of threads; fewer, but at least 30, where they would take too long.
    Returns:
        The document that `--json` prints (schemas/bench.json); it is also kept as bench.json, beside the picture
        bench.png, in the folder of each run that a file came from, or in edgekit-bench/.
    Raises:
        EdgekitError: impossible options, nothing to measure, or a file that is damaged or that its runtime refuses.
    """
    for option, number in (("--batch", batch), ("--rounds", rounds)):
        if number < 1:
            raise EdgekitError("at least 1 is needed", where=f"{option} {number}")
    counts, sizes = _threads(threads), sorted({1, batch})
    named = [what] if isinstance(what, str | Path) else what or []
    listed = _running_here(contenders(named))
    load = os.getloadavg()[0]
    if load > machine.cores() / 2:
        say(f"Other programs keep this machine busy (load {load:.1f} on {machine.cores()} cores): times will be longer")
    with contextlib.ExitStack() as after, progress(by_itself=False) as bar:
        after.callback(torch.set_num_threads, torch.get_num_threads())
        total = COLD * len(listed) + (WARM_UP + rounds) * len(counts) * len(sizes)
        step = _pace(bar, bar.add_task("measuring", total=total, note=""))
        # First the children: a file that kills its runtime kills one of them, and is then not opened here.
        cold = _cold_starts(listed, sizes, max(counts), step)
        cells = _latencies(listed, sizes, counts, rounds, step)
    found, setting = judged(listed)
    reports = [_report(*them) for them in zip(listed, cells, cold, found, strict=True)]
    _mark(reports)
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "edgekit": __version__,
        "machine": judge.machine_block() | {"cores": machine.cores(), "load": load},
        "batches": sizes,
        "threads": counts,
        "cold_starts": COLD,
    }
    if setting is not None:
        document["judged_under"] = _ball(setting) | {"data_sha256": setting.data, **_drawn(setting)}
    document["artifacts"] = reports
    _keep(document, list(dict.fromkeys(OWN if one.run is None else one.run.folder for one in listed)))
    return document


def counted(cores: int) -> list[int]:
    """1, 2, 4, … and all cores."""
    return sorted({2**power for power in range(cores.bit_length())} | {cores})


def _threads(asked: int | str | Sequence[int] | None) -> list[int]:
    cores = machine.cores()
    if asked is None:
        return counted(cores)
    given = asked.split(",") if isinstance(asked, str) else [asked] if isinstance(asked, int) else asked
    shown = f"--threads {','.join(map(str, given))}"
    try:
        counts = sorted({int(count) for count in given})
    except ValueError:
        raise EdgekitError("no numbers of threads", where=shown, mend="Write --threads 1,2") from None
    if not counts or counts[0] < 1 or counts[-1] > cores:
        raise EdgekitError(f"a number of threads goes from 1 to {cores} on this machine", where=shown)
    return counts


def _running_here(listed: Sequence[Contender]) -> list[Contender]:
    """Those that this machine can run; each other one is named."""
    lacked = {one.name: lacking(one.format) for one in listed}
    if (missing := next(iter(lacked.values()))) and all(lacked.values()):
        what = f"nothing here can be measured on this machine: {listed[0].name} needs {missing}"
        raise EdgekitError(what, mend="Run it on the device", exit_code=ENVIRONMENT)
    for name, missing in lacked.items():
        if missing:
            say(f"{name} is not measured: it needs {missing}")
    return [one for one in listed if not lacked[one.name]]


def _pace(bar: Progress, task: TaskID) -> Step:
    """What tells the bar of each round, and draws it seldom: drawing empties the caches of the file that is next."""
    drawn = -math.inf

    def step(note: str, advance: int = 1) -> None:
        nonlocal drawn
        bar.update(task, note=note, advance=advance)
        if time.monotonic() - drawn > 0.5:
            bar.refresh()
            drawn = time.monotonic()

    return step


# Cold starts ----------------------------------------------------------------------------------------------------------


def _cold_starts(listed: Sequence[Contender], sizes: Sequence[int], threads: int, step: Step) -> list[dict[str, Any]]:
    """Median seconds and bytes of COLD fresh processes for each file, which take turns."""
    say(f"Starting {COLD} fresh processes for each of {len(listed)} files")
    runs: list[list[dict[str, Any]]] = [[] for _ in listed]
    for _ in range(COLD):
        for one, own in zip(listed, runs, strict=True):
            own.append(cold_start(one, sizes[-1], threads))
            step(f"cold start: {one.name}")
    # A child answers one image, then the batch: two figures of memory, the second nothing new where the batch is one.
    return [
        {
            "seconds": statistics.median(each["seconds"] for each in own),
            "threads": threads,
            "memory": [
                {"batch": size, "bytes": int(statistics.median(each["memory"][place] for each in own))}
                for place, size in enumerate(sizes)
            ],
        }
        for own in runs
    ]


def cold_start(one: Contender, batch: int, threads: int) -> dict[str, Any]:
    """What judge/cold.py measures in one fresh process.

    Raises:
        EdgekitError: the file's runtime refuses it or dies of it.
    """
    command = [sys.executable, "-P", "-m", "edgekit.judge.cold", str(one.path.resolve()), "--format", one.format]
    command += ["--shape", ",".join(map(str, one.shape)), f"--batch={batch}", f"--threads={threads}"]
    command += ["--trust-file"] if one.format in CODE else []  # an artifact's digest vouches for it
    folders = [*filter(None, sys.path), str(_ROOT)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    try:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=_CHILD, check=False
        )
    except subprocess.TimeoutExpired:
        raise EdgekitError(f"has not answered after {_CHILD:.0f} seconds", where=one.path) from None
    except OSError as error:
        what = f"a child process cannot be started ({error.strerror})"
        raise EdgekitError(what, where=sys.executable, exit_code=ENVIRONMENT) from None
    words = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
    if done.returncode in (BAD_INPUT, ENVIRONMENT) and words:
        raise EdgekitError(words[0], where=one.path, exit_code=done.returncode)
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        mend = "Memory may have run out" if -done.returncode == signal.SIGKILL else None
        raise EdgekitError(f"its runtime was killed by {name}", where=one.path, mend=mend)
    if done.returncode:
        said = f"; its last words: {words[0][:200]}" if words else ""
        raise EdgekitError(f"its runtime ended with exit status {done.returncode}{said}", where=one.path)
    return json.loads(done.stdout)


# Latency --------------------------------------------------------------------------------------------------------------


def _latencies(
    listed: Sequence[Contender], sizes: Sequence[int], counts: Sequence[int], rounds: int, step: Step
) -> list[list[dict[str, Any]]]:
    """For each file one entry a number of threads and batch."""
    cells: list[list[dict[str, Any]]] = [[] for _ in listed]
    for threads in counts:
        torch.set_num_threads(threads)  # which is how TorchScript is told
        opened = [judge.open(one.what, threads=threads, isolated=False) for one in listed]
        for size in sizes:
            note = f"latency: {threads} thread{'s' * (threads > 1)}, batch {size}"
            say(f"{note}, {len(listed)} file{'s in turn' if len(listed) > 1 else ''}")
            times = machine.turns(
                [partial(model, images(one, size)) for model, one in zip(opened, listed, strict=True)],
                rounds,
                warm_up=WARM_UP,
                fewest=min(FEWEST, rounds),
                seconds=PATIENCE * len(listed),
                seed=0,
                after=partial(step, note),
            )
            step(note, rounds - len(times[0]))  # those that would have taken too long
            for own, seconds in zip(cells, times, strict=True):
                own.append({"threads": threads, "batch": size, **summary(seconds, size)})
    return cells


def images(one: Contender, count: int) -> Tensor:
    """(count, …) float32 in [0, 1], random and always the same: no runtime here is faster on one image than another."""
    return torch.rand(count, *one.shape, generator=torch.Generator().manual_seed(0))


def summary(seconds: Sequence[float], batch: int) -> dict[str, Any]:
    """Median, nearest-rank percentiles, and the images a second that the median amounts to."""
    median = statistics.median(seconds)
    return {
        "rounds": len(seconds),
        "median": median,
        "p90": nearest_rank(seconds, 90),
        "p99": nearest_rank(seconds, 99),
        "images_per_second": batch / median,
    }


# The document ---------------------------------------------------------------------------------------------------------


def _report(
    one: Contender, cells: Sequence[dict[str, Any]], cold: dict[str, Any], found: Judged | None
) -> dict[str, Any]:
    fastest = min((cell for cell in cells if cell["batch"] == 1), key=lambda cell: cell["median"])
    busiest = max(cells, key=lambda cell: cell["images_per_second"])
    memory = cold.pop("memory")
    report: dict[str, Any] = {
        "name": one.name,
        "format": one.format,
        "precision": one.precision,
        **({} if one.run is None else {"run": utf8(one.run.folder)}),
        "file": one.within,
        "bytes": one.bytes,
        "sha256": one.sha256,
        "input": list(one.shape),
        "operators": _operators(one),
        "latency": list(cells),
        "fastest": {key: fastest[key] for key in ("threads", "median")},
        "throughput": {key: busiest[key] for key in ("threads", "batch", "images_per_second")},
        "cold_start": cold,
        "peak_memory": memory,
        "front": [],
    }
    if found is not None:
        report["robust_accuracy"] = to_dict(found.accuracy)
        report["judged"] = {
            "verdict": found.verdict,
            **_ball(found.setting),
            **_drawn(found.setting),
            "file": utf8(found.path),
            "comparable": found.against is None,
            **({} if found.against is None else {"why": found.against}),
        }
    return report


def _ball(setting: Setting) -> dict[str, Any]:
    about = {"attacks": list(setting.attacks), "norm": setting.norm, "epsilon": setting.epsilon}
    return about | {"grid": setting.grid}


def _drawn(setting: Setting) -> dict[str, Any]:
    return {"samples": setting.samples, "seed": setting.seed, "processors": list(setting.processors)}


def _operators(one: Contender) -> dict[str, Any]:
    """As artifact.json has it, else read from the graph that the runtime makes of the file here."""
    if not isinstance(one.what, Path) and "operators" in one.what.record:
        return one.what.record["operators"]
    format = FORMATS[one.format]
    if hasattr(format, "running"):
        return format.running(one.path)
    return {"int8": 0, **describe(one.format, one.path)["operators"]}


def _mark(reports: Sequence[dict[str, Any]]) -> None:
    """Say of each file what it is on the Pareto front of, among those whose robust accuracies can be compared."""
    compared = [report for report in reports if report.get("judged", {}).get("comparable")]
    gains = [report["robust_accuracy"]["value"] for report in compared]
    costs = {
        "latency": [report["fastest"]["median"] for report in compared],
        "size": [report["bytes"] for report in compared],
    }
    for name, values in costs.items():
        for report, on in zip(compared, front(values, gains), strict=True):
            report["front"] += [name] * on


def _keep(document: dict[str, Any], folders: Sequence[Path]) -> None:
    for folder in folders:
        write_json(folder / FILE, document)
        pareto.draw(document, (folder / FILE).with_suffix(".png"))
        say(f"Kept in {folder}: {FILE}, bench.png")
