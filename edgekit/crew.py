"""Several processes for one verdict, started by accelerate, torchrun or mpirun: who does what, and who speaks.

Process 0 is the command; the others are helpers. The parts of a campaign (one attack, one source, one chunk of samples)
go round in turn. A chunk holds the same samples however many processes there are, so every batch is the same and the
verdict too, bit for bit. A helper hands its parts to process 0, which checks, writes and prints alone.

What passes between them goes through torch's key-value store, which every launcher offers; a helper computes ahead of
process 0 as far as it likes, and neither waits for one that is gone.
"""

import contextlib
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, ParamSpec

import safetensors.torch
import torch

from edgekit import machine
from edgekit.attacks.campaign import ELSEWHERE, Memory, Part
from edgekit.console import rank, say
from edgekit.errors import BAD_INPUT, ENVIRONMENT, EdgekitError

P = ParamSpec("P")

_PIECE = 4 * 2**20  # bytes: the store takes no value above 8 MiB
_PAUSE = 0.02  # seconds between two looks into the store
_PATIENCE = 5.0  # seconds that process 0 waits at its end for helpers to end with it
_CONNECT = timedelta(minutes=5)
_OUTCOME, _LEFT = "outcome", "left"


class Released(Exception):
    """A helper has done its share; what follows is process 0's."""


class Crew:
    """The processes of this piece of work, seen from one of them."""

    def __init__(self, size: int = 1, store: Any = None, children: Sequence["subprocess.Popen[bytes]"] = ()) -> None:
        self.rank, self.size, self.store, self.children = rank() if size > 1 else 0, size, store, children
        self.turn = 0  # counts parts: the same on all processes, which ask for the same parts in the same order

    @property
    def helper(self) -> bool:
        return self.rank > 0

    def release(self) -> None:
        """Where helpers leave.

        Raises:
            Released: on a helper.
        """
        if self.helper:
            raise Released

    def announce(self, event: str, word: str) -> None:
        """Process 0 tells the helpers a word; elsewhere nothing."""
        if self.size > 1 and not self.helper:
            self.store.set(event, word.encode())

    def told(self, event: str) -> str:
        """What process 0 announced; helpers wait for it."""
        self._until(event)
        return self.store.get(event).decode()

    def share(self, memory: Memory | None) -> Memory | None:
        """The Memory of one campaign, behind which the processes share its parts."""
        return memory if self.size == 1 or memory is None else _Shared(self, memory)

    def send(self, number: int, part: Part) -> None:
        if self.store.check([_OUTCOME]):  # process 0 has broken off
            raise Released
        cost = torch.tensor([part.seconds, part.passes], dtype=torch.float64)
        tensors = {"adversarial": part.adversarial.contiguous(), "fooled": part.fooled.contiguous(), "cost": cost}
        data = safetensors.torch.save(tensors)
        pieces = [data[begin : begin + _PIECE] for begin in range(0, len(data), _PIECE)]
        for place, piece in enumerate(pieces):
            self.store.set(f"part/{number}/{place}", piece)
        self.store.set(f"part/{number}", str(len(pieces)))  # last: what is announced is there

    def receive(self, number: int) -> Part:
        """The part that another process was to do.

        Raises:
            EdgekitError: it could not.
        """
        self._until(f"part/{number}", number % self.size)
        count = int(self.store.get(f"part/{number}"))
        names = [f"part/{number}/{place}" for place in range(count)]
        tensors = safetensors.torch.load(b"".join(self.store.get(name) for name in names))
        for name in names:
            self.store.delete_key(name)
        seconds, passes = tensors["cost"].tolist()
        return Part(tensors["adversarial"], tensors["fooled"], seconds, int(passes))

    def _until(self, key: str, other: int = 0) -> None:
        """Wait for a key, and give up where the process that is to set it has failed or is gone."""
        fault = f"fault/{other}" if other else _OUTCOME
        while not self._there(key):
            if self._there(fault):
                raise (_error(self.store.get(fault)) if other else Released())
            if any(child.poll() is not None for child in self.children):
                raise EdgekitError("a process that helped has ended too early", exit_code=ENVIRONMENT)
            time.sleep(_PAUSE)

    def _there(self, key: str) -> bool:
        try:
            return self.store.check([key])
        except RuntimeError:  # torch.distributed has an error of its own for it, which not every build has
            raise EdgekitError("process 0 is gone", exit_code=ENVIRONMENT) from None

    def tell(self, key: str, document: Any) -> None:
        with contextlib.suppress(RuntimeError):  # nobody is there to hear it
            data = json.dumps(document).encode()
            for place, begin in enumerate(range(0, len(data), _PIECE)):
                self.store.set(f"{key}/{place}", data[begin : begin + _PIECE])
            self.store.set(key, str(-(-len(data) // _PIECE)))

    def hear(self) -> Any:
        """What process 0 made of it all.

        Raises:
            EdgekitError: the one that it ended with.
        """
        while not self._there(_OUTCOME):
            time.sleep(_PAUSE)
        count = int(self.store.get(_OUTCOME))
        document = json.loads(b"".join(self.store.get(f"{_OUTCOME}/{place}") for place in range(count)))
        if "what" in document:
            raise EdgekitError(document["what"], exit_code=document["exit_code"])
        return document


class _Shared:
    """A campaign.Memory: its own parts come from `memory` or are computed, those of others from them."""

    def __init__(self, crew: Crew, memory: Memory) -> None:
        self.crew, self.memory, self.number = crew, memory, 0

    def recall(self, attack: str, source: str, chunk: int) -> Part | None:
        self.number, self.crew.turn = self.crew.turn, self.crew.turn + 1
        if self.number % self.crew.size != self.crew.rank:
            return ELSEWHERE if self.crew.helper else self.crew.receive(self.number)
        part = self.memory.recall(attack, source, chunk)
        if part is not None and self.crew.helper:
            self.crew.send(self.number, part)
        return part

    def keep(self, attack: str, source: str, chunk: int, part: Part) -> None:
        self.memory.keep(attack, source, chunk, part)
        if self.crew.helper:
            self.crew.send(self.number, part)


_crew = Crew()
_assembled = 0


def current() -> Crew:
    """The crew that is at work; one of one process where no launcher started more."""
    return _crew


def together(work: Callable[P, dict[str, Any]]) -> Callable[P, dict[str, Any]]:
    """`work`, done by all processes that a launcher started; each of them returns, or raises, what process 0 does.

    Within `work` a helper comes as far as `Crew.release`.
    """

    @functools.wraps(work)
    def shared(*args: P.args, **kwargs: P.kwargs) -> dict[str, Any]:
        global _crew
        _crew = crew = _assemble()
        if crew.size == 1:
            return work(*args, **kwargs)
        if not crew.helper:
            with _telling(crew):
                document = work(*args, **kwargs)
                crew.tell(_OUTCOME, document)
                return document
        try:
            work(*args, **kwargs)
        except Released:
            pass
        except EdgekitError as error:
            crew.store.set(f"fault/{crew.rank}", json.dumps({"what": str(error), "exit_code": error.exit_code}))
        return crew.hear()

    return shared


@contextlib.contextmanager
def _telling(crew: Crew) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        known = isinstance(error, EdgekitError)
        what, code = (str(error), error.exit_code) if known else ("process 0 broke off", 130)
        crew.tell(_OUTCOME, {"what": what, "exit_code": code})
        raise


def leave(code: int) -> int:
    """Called last by the command: helpers end after process 0, for a launcher ends all once one has failed."""
    crew = _crew
    if crew.size == 1:
        return code
    with contextlib.suppress(RuntimeError, EdgekitError):
        if crew.helper:
            while not crew._there(_LEFT):
                time.sleep(_PAUSE)
            crew.store.set(f"{_LEFT}/{crew.rank}", b"1")
            return code
        sys.stdout.flush()
        crew.store.set(_LEFT, b"1")
        deadline = time.monotonic() + _PATIENCE
        others = [f"{_LEFT}/{other}" for other in range(1, crew.size)]
        while not crew.store.check(others) and time.monotonic() < deadline:
            time.sleep(_PAUSE)
    return code


def _assemble() -> Crew:
    """The crew of this call of `together`.

    Raises:
        EdgekitError: the other processes cannot be reached.
    """
    global _assembled
    _assembled += 1
    size, asked = machine.processes(), machine.asked_of_accelerate()
    if size == 1 and asked == 0:
        say("accelerate was asked for several processes and started this one alone; it goes on alone.")
    if size == 1 and asked <= 1:
        return Crew()
    from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

    prefix = f"edgekit/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{_assembled}"
    if size == 1:
        # On CPUs accelerate starts one process, whatever --num_processes says, and leaves the others to MPI.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=_CONNECT)
        environment = os.environ | {
            "WORLD_SIZE": str(asked),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
        }
        children = [
            subprocess.Popen(sys.orig_argv, env=environment | {"RANK": str(other)}, stdout=subprocess.DEVNULL)
            for other in range(1, asked)
        ]
        return Crew(asked, PrefixStore(prefix, store), children)
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError):
        raise EdgekitError(
            f"{size} processes were started that cannot find each other",
            mend="Set MASTER_ADDR and MASTER_PORT, or start them with torchrun",
            exit_code=BAD_INPUT,
        ) from None
    hosts = rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = TCPStore(host, port, is_master=hosts, wait_for_workers=False, timeout=_CONNECT)
    except RuntimeError as error:
        what = f"the processes do not find each other ({str(error).splitlines()[0][:120]})"
        raise EdgekitError(what, where=f"{host}:{port}", exit_code=ENVIRONMENT) from None
    return Crew(size, PrefixStore(prefix, store))


def _error(data: bytes) -> EdgekitError:
    said = json.loads(data)
    return EdgekitError(said["what"], exit_code=said["exit_code"])
