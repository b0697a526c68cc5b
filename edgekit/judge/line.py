"""The streams to a judge, and its process where it is a child of this one: opened, watched, cleaned away."""

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

PIPE = 2**20  # bytes, what Linux grants anyone: through its usual 64 KiB a batch of photos takes fifty turns
_F_SETPIPE_SZ = 1031  # Linux's number; Python names it only where it was built with headers that do
_WORDS = 4096  # bytes of its stderr that are kept
_LINE = 300  # characters of its last line that are repeated


class Line:
    """Two descriptors, neither of which blocks; a child's stderr and process beside them."""

    def __init__(
        self, reader: int, writer: int, stderr: int | None = None, process: subprocess.Popen[bytes] | None = None
    ) -> None:
        self.reader, self.writer, self.stderr, self.process = reader, writer, stderr, process
        self._words, self._open = b"", True
        for stream in self._streams():
            os.set_blocking(stream, False)

    def _streams(self) -> list[int]:
        return [self.reader, self.writer] + ([] if self.stderr is None else [self.stderr])

    def listen(self) -> bool:
        """Take what the judge says on its stderr; False where there was nothing."""
        if self.stderr is None:
            return False
        try:
            said = os.read(self.stderr, 2**16)
        except BlockingIOError:
            return False
        self._words = (self._words + said)[-_WORDS:]
        if not said:
            os.close(self.stderr)
            self.stderr = None
        return bool(said)

    def last_words(self) -> str:
        lines = [line.strip() for line in self._words.decode(errors="replace").splitlines() if line.strip()]
        return lines[-1][:_LINE] if lines else ""

    def end(self, patience: float) -> int | None:
        """Close the streams and see the process to its end, with all that it started; no zombie stays.

        Returns:
            The exit status (negative: a signal) of a process that ended by itself within `patience` seconds.
        """
        if not self._open:
            return None
        self._open = False
        os.close(self.writer)
        ended = False
        if self.process is not None:
            deadline = time.monotonic() + patience
            # Looked at, not reaped: until it is, its number cannot become another group's.
            while not (ended := self._ended(self.process.pid)) and time.monotonic() < deadline:
                if not self.listen():
                    time.sleep(0.002)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        while self.listen():
            pass
        os.close(self.reader)
        if self.stderr is not None:
            os.close(self.stderr)
        return self.process.returncode if self.process is not None and ended else None

    @staticmethod
    def _ended(pid: int) -> bool:
        try:
            return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:  # somebody else has reaped it
            return True


def started(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Line:
    """Start a program that answers on its stdout what it is asked on its stdin.

    Raises:
        OSError: it cannot be started.
    """
    theirs_in, writer = os.pipe()
    reader, theirs_out = os.pipe()
    stderr, theirs_err = os.pipe()
    try:
        # A group of its own, so that what it starts can be ended with it.
        process = subprocess.Popen(
            command, stdin=theirs_in, stdout=theirs_out, stderr=theirs_err, env=environment, process_group=0
        )
    except BaseException:
        for stream in (writer, reader, stderr):
            os.close(stream)
        raise
    finally:
        for stream in (theirs_in, theirs_out, theirs_err):
            os.close(stream)
    for stream in (reader, writer):
        _enlarge(stream)
    return Line(reader, writer, stderr, process)


def dialled(host: str, port: int, seconds: float) -> Line:
    """Connect over TCP.

    Raises:
        OSError: nobody answers within `seconds`.
    """
    wire = socket.create_connection((host, port), timeout=seconds)
    wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    reader = wire.detach()
    return Line(reader, os.dup(reader))  # two descriptors: each is polled for its own direction


def _enlarge(pipe: int) -> None:
    if sys.platform == "linux":
        import fcntl

        with contextlib.suppress(OSError):  # a user whose pipes are many already gets no more
            fcntl.fcntl(pipe, _F_SETPIPE_SZ, PIPE)


def ready(reader: int, writer: int | None, stderr: int | None, seconds: float) -> set[int]:
    """Which of the descriptors can be read or written (or have ended) within so many seconds."""
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    if writer is not None:
        poll.register(writer, select.POLLOUT)
    if stderr is not None:
        poll.register(stderr, select.POLLIN)
    return {stream for stream, _ in poll.poll(max(0, -int(-1000 * seconds // 1)))}
