"""LiteRT's interpreter, opened in one way wherever edgekit opens it; numpy in, numpy out, and no torch."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy

from edgekit.errors import EdgekitError, need

_IDENTIFIER = b"TFL3"  # of a TFLite flatbuffer, from its fifth byte on


class Session:
    """A TFLite file on the CPU, XNNPACK's kernels on: (N, C, H, W) float32 -> (N, K) float32.

    Args:
        threads: of one inference; None is the runtime's own choice.
        resize: try another number of images than the file has, even where it does not say that it takes any.
    Attributes:
        classes: 0 where the file does not say.
    Raises:
        EdgekitError: the runtime does not take the file, or the file does not take or answer floats; (exit code 4) the
            runtime is not installed.
    """

    def __init__(self, path: Path, *, threads: int | None = None, resize: bool = False) -> None:
        runtime = need("ai_edge_litert.interpreter", "litert")
        self._path = path
        try:
            with path.open("rb") as file:
                known = file.read(8)[4:] == _IDENTIFIER
        except OSError as error:
            raise EdgekitError(f"cannot be read ({error.strerror})", where=path) from None
        if not known:
            raise EdgekitError("not a TFLite file", where=path)
        try:
            with quiet():
                self._interpreter: Any = runtime.Interpreter(model_path=str(path), num_threads=threads)
                self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise _refused(path, error) from None
        inputs, outputs = self._interpreter.get_input_details(), self._interpreter.get_output_details()
        if len(inputs) != 1 or not outputs:
            raise EdgekitError(f"takes {len(inputs)} inputs, not images alone", where=path)
        self._input, self._output = inputs[0], outputs[0]
        for kind, one in (("takes", self._input), ("answers", self._output)):
            if one["dtype"] is not numpy.float32:
                what = f"{kind} {numpy.dtype(one['dtype']).name}, not floats"
                raise EdgekitError(what, where=path)
        self._shape = [int(size) for size in self._input["shape"]]
        anything = resize or [int(size) for size in self._input["shape_signature"]][:1] == [-1]
        self._batch = None if anything else self._shape[0] if self._shape else 1
        answered = [int(size) for size in self._output["shape"]]
        self.classes = answered[1] if len(answered) == 2 else 0

    def __call__(self, pixels: numpy.ndarray) -> numpy.ndarray:
        if not len(pixels):
            return numpy.empty((0, self.classes), numpy.float32)
        if list(pixels.shape[1:]) != self._shape[1:]:
            wanted = ["batch" if self._batch is None else self._batch, *self._shape[1:]]
            raise EdgekitError(f"takes images of the shape {wanted}, not {list(pixels.shape)}", where=self._path)
        if self._batch is None:
            return self._run(pixels)
        # The file takes one number of images only: full batches, the last one filled up with copies of its last image.
        rest = -len(pixels) % self._batch
        padded = numpy.concatenate([pixels, pixels[-1:].repeat(rest, 0)]) if rest else pixels
        parts = [self._run(padded[i : i + self._batch]) for i in range(0, len(padded), self._batch)]
        return numpy.concatenate(parts)[: len(pixels)]

    def _run(self, pixels: numpy.ndarray) -> numpy.ndarray:
        given = numpy.ascontiguousarray(pixels, numpy.float32)
        try:
            if len(given) != self._shape[0]:
                self._interpreter.resize_tensor_input(self._input["index"], list(given.shape))
                self._shape[0] = 0  # known again once the tensors are there
                self._interpreter.allocate_tensors()
                self._shape[0] = len(given)
            self._interpreter.set_tensor(self._input["index"], given)
            self._interpreter.invoke()
        except (ValueError, RuntimeError) as error:
            raise _refused(self._path, error, "such images") from None
        scores = self._interpreter.get_tensor(self._output["index"])
        if scores.ndim < 2 or len(scores) != len(given):
            raise EdgekitError(f"answers scores of shape {scores.shape} to {len(given)} images", where=self._path)
        return scores.reshape(len(scores), -1)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing that native code writes to stderr is seen: LiteRT greets there past Python's stream, ExecuTorch in it."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _refused(path: Path, error: Exception, what: str = "the file") -> EdgekitError:
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return EdgekitError(f"LiteRT does not take {what} ({said[:200]})", where=path)
