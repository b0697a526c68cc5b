"""This machine: its processor, its memory, its device, and the number of threads that is fastest here.

torch is loaded at first use: what the processor is can be said where torch is missing or broken (doctor.py).
"""

import contextlib
import gc
import json
import math
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.errors import ENVIRONMENT, EdgekitError
from edgekit.files import cache_folder, write_json

if TYPE_CHECKING:
    import torch

# What decides how 8-bit products are summed (SATURATION), best first; named as /proc/cpuinfo names them.
_INT8 = ("amx_int8", "avx512_vnni", "avx_vnni", "avx512bw", "avx2", "sse4_1", "asimddp", "asimd")
_SATURATE = ("avx512bw", "avx2")  # these sum pairs of products in 16 bits; SSE alone does not (FACTS)
_DEVICES = ("cpu", "cuda", "mps", "xpu")  # kinds that compute; torch has others, such as meta, which only pretends to
# How torch and its backends say that memory is out where they have no class of error for it.
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def _cpuinfo(key: str) -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")


def processor() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def vendor() -> str:
    """Of the processor, as x86 names it: "GenuineIntel"; empty where nothing is said."""
    return _cpuinfo("vendor_id")


def instructions() -> tuple[str, ...]:
    """The instruction sets for 8-bit arithmetic here, the widest first."""
    flags = (_cpuinfo("flags") or _cpuinfo("Features")).split()
    return tuple(name for name in _INT8 if name in flags)


def int8_instructions() -> str:
    """The widest of them, or "unknown"."""
    return next(iter(instructions()), "unknown")


def saturates() -> bool:
    """Whether this processor's 8-bit products are summed in 16 bits, so that a sum can clip (SATURATION)."""
    return int8_instructions() in _SATURATE


def family() -> str:
    return {"x86_64": "x86", "AMD64": "x86", "aarch64": "arm64"}.get(platform.machine(), platform.machine())


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_CGROUP = Path("/sys/fs/cgroup")


def memory() -> tuple[int, int]:
    """Bytes in all and bytes that are free, of this machine or of the container that this process is in."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    path = Path("/proc/meminfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    free = next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), total)
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return total, min(total, free)
    if limit.isdigit():
        total, free = min(total, int(limit)), min(free, max(0, int(limit) - int(used)))
    return total, min(total, free)


def device(name: str | None) -> "torch.device":
    """The device asked for, else the first GPU, else the CPU.

    Raises:
        EdgekitError: (exit code 4) the device is not there; (2) the name is no device.
    """
    import torch

    if name is None:
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    try:
        chosen = torch.device(name)
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in _DEVICES:
        raise EdgekitError(
            "there is no such device", where=f"--device {name}", mend="Known: cpu, cuda, cuda:0, mps, xpu"
        )
    try:
        torch.zeros(1, device=chosen)
    except (RuntimeError, AssertionError) as error:  # an AssertionError: a build of torch without CUDA says it so
        raise EdgekitError(
            f"the device cannot be used ({str(error).splitlines()[0]})",
            where=f"--device {name}",
            mend="Run with --device cpu",
            exit_code=ENVIRONMENT,
        ) from None
    return chosen


def check_precision(precision: str, device: "torch.device", *, where: object) -> None:
    """Refuse a mixed precision that `device` does not compute in: nothing is replaced in silence.

    Raises:
        EdgekitError: (exit code 4) it does not.
    """
    import torch

    able = {
        "fp16": device.type in ("cuda", "xpu"),
        "bf16": device.type != "mps" and (device.type != "cuda" or torch.cuda.is_bf16_supported()),
    }
    if not able.get(precision, True):
        raise EdgekitError(
            f"train.precision = '{precision}' does not work on the device '{device}'",
            where=where,
            mend="Set train.precision=fp32, or name another --device",
            exit_code=ENVIRONMENT,
        )


def processes() -> int:
    """How many processes a launcher (accelerate, torchrun, mpirun) started for this one piece of work."""
    names = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
    return max(int(value) if (value := os.environ.get(name, "")).isdigit() else 1 for name in names)


def asked_of_accelerate() -> int:
    """How many processes `accelerate launch --cpu` was asked for; it starts one and leaves the rest to MPI.

    Returns:
        1 where it was asked for no more, or was not there; 0 where it was asked for several and how many is not known.
    """
    if not {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= set(os.environ) or processes() > 1:
        return 1
    import psutil  # accelerate's own

    try:
        parent = psutil.Process().parent()
        words = parent.cmdline() if parent is not None else []
    except psutil.Error:
        return 0
    said = {}
    for word, after in zip(words, [*words[1:], ""], strict=True):
        name, _, value = word.partition("=")
        said.setdefault(name.replace("-", "_"), value or after)
    count = said.get("__num_processes", "")
    return int(count) if count.isdigit() and said.get("__num_machines", "1") == "1" else 0


@contextlib.contextmanager
def enough_memory(*, where: object, mend: str) -> Iterator[None]:
    """Say in one sentence that the memory of the machine or of its GPU is out.

    Raises:
        EdgekitError: (exit code 4) it is.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise EdgekitError("out of memory", where=where, mend=mend, exit_code=ENVIRONMENT) from error


def out_of_memory(error: BaseException) -> bool:
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _NO_MEMORY)


def threads(key: str, work: Callable[[], object]) -> int:
    """The number of torch threads with which `work` is fastest, measured once a machine and `key`, then remembered.

    Two busy shared cores can be slower than one (FACTS), so nothing is assumed. The answer is kept in the cache folder:
    the sums of a convolution depend on it in the last bit, and the same recipe must give the same weights again.
    """
    import torch

    place = cache_folder() / "threads.json"
    name = f"{processor()}, {cores()} cores, torch {torch.__version__}, {key}"
    try:
        known = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    if name not in known:
        candidates = sorted({1, max(1, cores() // 2), cores()})
        seconds: dict[int, list[float]] = {count: [] for count in candidates}
        for _ in range(4):  # interleaved, so that a busy neighbour slows all candidates alike; the first round warms up
            for count in candidates:
                torch.set_num_threads(count)
                begin = time.perf_counter()
                work()
                seconds[count].append(time.perf_counter() - begin)
        # More threads must earn their place: within a tenth the smaller number wins.
        best = min(statistics.median(times[1:]) for times in seconds.values())
        known[name] = next(count for count in candidates if statistics.median(seconds[count][1:]) <= 1.1 * best)
        write_json(place, known)
    return known[name]


def interleaved(works: Sequence[Callable[[], object]], repetitions: int = 15) -> list[float]:
    """Median seconds of each piece of work, run in turn so that a drifting machine slows all alike."""
    return [statistics.median(times) for times in turns(works, repetitions)]


def turns(
    works: Sequence[Callable[[], object]],
    rounds: int,
    *,
    warm_up: int = 2,
    fewest: int = 1,
    seconds: float = math.inf,
    seed: int | None = None,
    after: Callable[[], object] = lambda: None,
) -> list[list[float]]:
    """Seconds of each piece of work in each round, run in turn so that a drifting machine slows all alike.

    Args:
        rounds: how many are counted, at most.
        warm_up: rounds before these, which warm caches and memory pools up and are not counted.
        fewest, seconds: once the counted rounds have taken so long and are so many, no further one begins.
        seed: draws another order for each round: what a piece leaves in the caches, and threads that it leaves awake,
            then burden all alike, and not always the same next one. None: the order given.
        after: called after each round, outside of what is timed.
    """
    times: list[list[float]] = [[] for _ in works]
    order, draw = list(range(len(works))), None if seed is None else random.Random(seed)
    spent, collecting = 0.0, gc.isenabled()
    gc.disable()  # as timeit does: a collection takes longer than many an inference, and hits whoever runs just then
    try:
        for number in range(-warm_up, rounds):
            if number >= fewest and spent >= seconds:
                break
            if draw is not None:
                draw.shuffle(order)
            for place in order:
                begin = time.perf_counter()
                works[place]()
                took = time.perf_counter() - begin
                if number >= 0:
                    times[place].append(took)
                    spent += took
            after()
    finally:
        if collecting:
            gc.enable()
    return times
