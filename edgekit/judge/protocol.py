"""The protocol of CLI.md, the judge's side: image batches come in, scores go out, all little-endian.

A request is N, C, H, W as uint32, then N*C*H*W float32 pixels in [0, 1]; a reply is N, K as uint32, then N*K float32
scores. `edgekit.judge.remote` is the other side. No torch here: the child imports this.
"""

import contextlib
import math
import struct
from collections.abc import Callable
from contextlib import AbstractContextManager
from io import RawIOBase

import numpy

from edgekit.errors import EdgekitError

REQUEST, REPLY = struct.Struct("<4I"), struct.Struct("<2I")
MESSAGE = 64 * 2**20  # bytes of pixels that edgekit puts into one request (one image, if that alone is larger)
ANNOUNCED = 2**30  # bytes that a judge lets a header announce: memory is taken before the pixels arrive
CLASSES = 100_000  # scores of one image that are believed

Scores = Callable[[numpy.ndarray], numpy.ndarray]  # (N, C, H, W) float32 -> (N, K) float32


def serve(
    reader: RawIOBase,
    writer: RawIOBase,
    scores: Scores,
    *,
    classes: int = 0,
    working: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
) -> None:
    """Answer requests until the other side closes.

    Args:
        reader, writer: unbuffered and blocking.
        classes: K, said in the answer to a batch without images; 0 where it is not known yet.
        working: makes the context in which a batch is answered, such as a time limit.
    Raises:
        EdgekitError: a request is cut short, or announces more than ANNOUNCED bytes.
        BrokenPipeError, ConnectionResetError: the other side went away.
    """
    held = bytearray()
    while header := _read(reader, bytearray(REQUEST.size)):
        shape = REQUEST.unpack(header)
        size = 4 * math.prod(shape)
        if size > ANNOUNCED:
            raise EdgekitError(f"a request announces {size:,} bytes of images; at most {ANNOUNCED:,} are taken")
        if len(held) != size:
            held = bytearray(size)
        if size and not _read(reader, held):
            raise EdgekitError("a request ends after its header")
        with working():
            answered = (
                scores(numpy.frombuffer(held, "<f4").reshape(shape)) if size else numpy.empty((shape[0], classes))
            )
        data = numpy.ascontiguousarray(answered, "<f4")
        _write(writer, REPLY.pack(*data.shape) + data.tobytes())


def _read(reader: RawIOBase, into: bytearray) -> bytearray | None:
    """`into`, filled; None where the stream ends before its first byte."""
    view = memoryview(into)
    have = 0
    while have < len(into):
        count = reader.readinto(view[have:])
        if not count and have:
            raise EdgekitError(f"a request is cut short ({have:,} of {len(into):,} bytes)")
        if not count:
            return None
        have += count
    return into


def _write(writer: RawIOBase, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[writer.write(view) or 0 :]
