"""The protocol of CLI.md, edgekit's side: a program or a device at the other end of two streams, as a Classifier."""

import os
import signal
import time
import weakref
from collections.abc import Callable
from typing import TypeVar

import numpy
import torch
from torch import Tensor

from edgekit.errors import BAD_INPUT, ENVIRONMENT, EdgekitError
from edgekit.judge.line import Line, ready
from edgekit.judge.protocol import CLASSES, MESSAGE, REPLY, REQUEST

T = TypeVar("T")

_PATIENCE = 1.0  # seconds that a judge gets to end by itself when its input ends


class Remote:
    """A judge that is asked over a Line: (N, C, H, W) float32 in [0, 1] on any device -> (N, K) float32 there.

    What it answers is checked: N, one K for all batches, finite scores, and no byte more. After the first fault the
    line is closed, for the streams may be out of step. A large batch goes in messages of at most 64 MiB.

    Args:
        name: how sentences call the judge.
        where: the file or option that they name.
        seconds: that it may take to read a message, and then to answer it.
        longer: how a user gives it more of them.
        own: it is edgekit's own child, whose exit statuses 2 and 4 come with a whole sentence.
    """

    differentiable = False

    def __init__(
        self,
        line: Line,
        *,
        name: str = "the judge",
        where: object = None,
        seconds: float = 60.0,
        longer: str = "Allow more `seconds`",
        own: bool = False,
    ) -> None:
        self.name, self.where, self.seconds, self.longer = name, where, seconds, longer
        self.classes = 0  # K, known after its first answer
        self._line, self._own = line, own
        self._fault: EdgekitError | None = None
        self._images: Tensor | None = None  # on the CPU: the batch that waits for its answer
        self._device, self._count, self._sent = torch.device("cpu"), 0, 0
        self._rows: int | None = None  # images in the message that waits for its answer
        self._outgoing: list[memoryview] = []
        self._incoming = bytearray()
        self._ended = False  # it closed its end
        self._task, self._when = "open the file", "before it was asked anything"
        # Also where nobody closes it: when it is forgotten, and at the end of this process.
        self._end = weakref.finalize(self, line.end, _PATIENCE)

    def __enter__(self) -> "Remote":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the conversation, and the judge where it is a child of this process."""
        self._fault = self._fault or EdgekitError(f"{self.name} has been closed", where=self.where)
        self._end()

    def __call__(self, images: Tensor) -> Tensor:
        self.ask(images)
        return self.answer()

    def ask(self, images: Tensor) -> None:
        """Send a batch and return while the judge works on it; `answer` must come before the next one.

        Raises:
            EdgekitError: the judge is gone, out of step, or does not read.
        """
        if self._fault is not None:
            raise self._fault
        if self._images is not None:
            raise RuntimeError("answer() comes before the next ask()")
        if images.ndim != 4:
            raise ValueError(f"a batch is (N, C, H, W), not {tuple(images.shape)}")
        self._device = images.device
        pixels = images.detach().to("cpu", torch.float32).contiguous()
        if len(pixels) == 0 and not self.classes:
            pixels = pixels.new_zeros(1, *pixels.shape[1:])  # a judge need not know batches without images: ask for K
        self._images, self._count, self._sent = pixels, len(images), 0
        if len(pixels):
            self._guarded(lambda: self._send(pixels))

    def answer(self) -> Tensor:
        """The scores (N, K) of the batch that was asked last.

        Raises:
            EdgekitError: the judge dies, is late, or answers with what is no answer.
        """
        if self._images is None:
            raise RuntimeError("ask() comes before answer()")
        images, parts = self._images, []
        while self._rows is not None:
            parts.append(self._guarded(self._receive))
            if self._sent < len(images):
                self._guarded(lambda: self._send(images))
        self._images = None
        scores = torch.cat(parts) if parts else torch.empty(0, self.classes)
        return scores[: self._count].to(self._device)

    def wait(self) -> None:
        """Ask for no images, which edgekit's own judges answer, to see that the file opened.

        Raises:
            EdgekitError: it did not.
        """
        self._outgoing, self._rows = [memoryview(REQUEST.pack(0, 0, 0, 0))], 0
        self._when = "while it opened the file"
        self._guarded(self._receive)

    def _guarded(self, work: Callable[[], T]) -> T:
        """`work`; whatever interrupts it leaves a line that nobody may use again."""
        try:
            return work()
        except BaseException as error:
            known = isinstance(error, EdgekitError)
            self._fault = error if known else EdgekitError(f"{self.name} was interrupted", where=self.where)
            self._images = None
            self._line.end(0)
            raise

    def _send(self, images: Tensor) -> None:
        """Send the next message of the batch."""
        self._move(0)  # what it sent unasked since its last answer shows here
        each = 4 * images[0].numel()
        chunk = images[self._sent :][: max(1, MESSAGE // max(1, each))]
        batch = f"{len(chunk):,} image{'s' * (len(chunk) != 1)} of {'x'.join(map(str, chunk.shape[1:]))}"
        pixels = numpy.ascontiguousarray(chunk.numpy(), "<f4")
        self._sent, self._rows = self._sent + len(chunk), len(chunk)
        self._outgoing = [memoryview(REQUEST.pack(*chunk.shape)), pixels.data.cast("B")]
        self._task, self._when = f"read {batch}", f"before it had read {batch}"
        self._until(lambda: not self._outgoing)
        self._task, self._when = f"answer {batch}", f"before its answer to {batch}"

    def _receive(self) -> Tensor:
        """The checked answer to the last message."""
        self._until(lambda: not self._outgoing and len(self._incoming) == self._total())
        self._move(0)
        count, classes = REPLY.unpack_from(self._incoming)
        scores = numpy.frombuffer(bytes(self._incoming), "<f4", offset=REPLY.size).reshape(count, classes)
        self._incoming.clear()
        self._rows, self._when = None, "after its last answer"
        wrong = ~numpy.isfinite(scores).all(1)
        if wrong.any():
            row = int(wrong.argmax()) + 1
            raise self._lied(f"answered scores that are infinite or no numbers (image {row:,} of {count:,})")
        if count:
            self.classes = classes
        return torch.from_numpy(scores.astype(numpy.float32))

    def _until(self, done: Callable[[], bool]) -> None:
        # Counted from here, not from the question: between ask and answer this process has its own work.
        deadline = time.monotonic() + self.seconds
        while not done():
            if self._ended:
                raise self._died()
            if (left := deadline - time.monotonic()) <= 0:
                raise EdgekitError(
                    f"{self.name} did not {self._task} within {self.seconds:g} s", where=self.where, mend=self.longer
                )
            self._move(left)

    def _move(self, seconds: float) -> None:
        """Write and read what can be, waiting at most so long for the first of it.

        Both ways at once: a judge that answers while it still reads must not wait for this process, nor this for it.
        """
        link = self._line
        able = ready(link.reader, link.writer if self._outgoing else None, link.stderr, seconds)
        if link.stderr in able:
            link.listen()
        try:
            if link.writer in able:
                rest = self._outgoing[0][os.write(link.writer, self._outgoing[0]) :]
                self._outgoing[:1] = [rest] if rest else []
            if link.reader in able:
                said = os.read(link.reader, 2**20)
                self._ended = not said
                self._incoming += said
        except BlockingIOError:
            return
        except (BrokenPipeError, ConnectionResetError):
            self._ended = True
        total = self._total()
        if len(self._incoming) > total:
            beyond = len(self._incoming) - total
            said = "more than its answer has" if total else "that nobody asked for"
            raise self._lied(f"sent {beyond:,} byte{'s' * (beyond != 1)} {said}")

    def _total(self) -> int:
        """The bytes of the answer that is due; those of its header until that has arrived."""
        if self._rows is None:
            return 0
        if len(self._incoming) < REPLY.size:
            return REPLY.size
        count, classes = REPLY.unpack_from(self._incoming)
        if count != self._rows:
            raise self._lied(f"answered {count:,} rows of scores to {self._rows:,} images")
        if count and not 1 <= classes <= CLASSES:
            raise self._lied(f"answered {classes:,} scores for each image; 1 to {CLASSES:,} are believed")
        if count and self.classes and classes != self.classes:
            raise self._lied(f"answered {classes:,} scores for each image, and {self.classes:,} before")
        return REPLY.size + 4 * count * classes

    def _lied(self, what: str) -> EdgekitError:
        return EdgekitError(f"{self.name} {what}", where=self.where)

    def _died(self) -> EdgekitError:
        """What is known of a judge that closed its end too early."""
        when, have = self._when, len(self._incoming)
        if have:
            when = f"in the middle of its answer ({have:,} of {self._total():,} bytes)"
        status, words = self._line.end(_PATIENCE), self._line.last_words()
        if self._own and status in (BAD_INPUT, ENVIRONMENT) and words:
            return EdgekitError(words, where=self.where, exit_code=status)
        if self._line.process is None:
            what = f"closed the connection {when}"
        elif status is None:
            what = f"closed its output {when}"
        elif status < 0:
            what = f"was killed by {_signal(-status)} {when}"
        else:
            what = f"ended with exit status {status} {when}"
        mend = "Memory may have run out" if status == -signal.SIGKILL else None
        return EdgekitError(
            f"{self.name} {what}" + (f"; its last words: {words}" if words else ""), where=self.where, mend=mend
        )


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
