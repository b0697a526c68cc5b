"""ONNX Runtime, opened in one way wherever edgekit opens it; numpy in, numpy out, and no torch."""

from collections.abc import Mapping
from pathlib import Path

import numpy

from edgekit.errors import EdgekitError, choose

PRECISE = {"session.x64quantprecision": "1"}  # 8-bit products never saturate, whatever the processor
_KINDS = {
    "tensor(float)": numpy.float32,
    "tensor(float16)": numpy.float16,
    "tensor(double)": numpy.float64,
    "tensor(uint8)": numpy.uint8,  # of floats that hold levels from 0 to 255
}


class Session:
    """A file on the CPU: (N, C, H, W) float32, or (N, H, W, C) where the file is so -> (N, K) float32.

    Args:
        threads: of one inference; None is the runtime's own choice.
        options: the runtime's session entries, such as PRECISE or {"session.qdqisint8allowed": "1"}.
        optimization: of the graph: "none", "basic", "extended" or "all", the runtime's default.
        output: the name of the output that holds the scores; the first by default.
        optimized: where the runtime shall write the graph that it runs.
    Raises:
        EdgekitError: the runtime does not take the file, or the file takes no images.
    """

    def __init__(
        self,
        path: Path,
        *,
        threads: int | None = None,
        options: Mapping[str, str] | None = None,
        optimization: str = "all",
        output: str | None = None,
        optimized: Path | None = None,
    ) -> None:
        import onnxruntime

        level = onnxruntime.GraphOptimizationLevel
        levels = {
            "none": level.ORT_DISABLE_ALL,
            "basic": level.ORT_ENABLE_BASIC,
            "extended": level.ORT_ENABLE_EXTENDED,
            "all": level.ORT_ENABLE_ALL,
        }
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3
        settings.intra_op_num_threads = threads or 0
        settings.graph_optimization_level = choose(levels, optimization, "optimization level")
        if optimized is not None:
            settings.optimized_model_filepath = str(optimized)
        # Spinning threads keep a core busy while torch makes the next gradient on it.
        for key, value in {"session.intra_op.allow_spinning": "0", **(options or {})}.items():
            settings.add_session_config_entry(key, value)
        try:
            path.open("rb").close()  # the runtime's own words for a file that cannot be read name its sources
            # By its path, so that weights beside the file are found.
            self._session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        except OSError as error:
            raise EdgekitError(f"cannot be read ({error.strerror})", where=path) from None
        except Exception as error:  # the runtime's own classes have no common base but this
            raise EdgekitError(
                f"ONNX Runtime does not take the file ({str(error).splitlines()[0][:200]})", where=path
            ) from None
        first = self._session.get_inputs()[0]
        outputs = {each.name: each for each in self._session.get_outputs()}
        scores = next(iter(outputs.values())) if output is None else choose(outputs, output, "output", where=path)
        if first.type not in _KINDS:
            raise EdgekitError(f"its input '{first.name}' takes {first.type}, not floats", where=path)
        self._input, self._type, self._output = first.name, _KINDS[first.type], scores.name
        self._batch = first.shape[0] if first.shape and isinstance(first.shape[0], int) else None
        self.classes = scores.shape[1] if len(scores.shape) == 2 and isinstance(scores.shape[1], int) else 0

    def __call__(self, pixels: numpy.ndarray) -> numpy.ndarray:
        if not self._batch or self._batch == len(pixels):
            return self._run(pixels)
        # The file takes one number of images only: full batches, the last one filled up with copies of its last image.
        rest = -len(pixels) % self._batch
        padded = numpy.concatenate([pixels, pixels[-1:].repeat(rest, 0)]) if rest else pixels
        parts = [self._run(padded[i : i + self._batch]) for i in range(0, len(padded), self._batch)]
        return numpy.concatenate(parts)[: len(pixels)] if parts else numpy.empty((0, self.classes), numpy.float32)

    def _run(self, pixels: numpy.ndarray) -> numpy.ndarray:
        levels = pixels.round() if self._type is numpy.uint8 else pixels
        given = {self._input: numpy.ascontiguousarray(levels, self._type)}
        scores = numpy.asarray(self._session.run([self._output], given)[0])
        if scores.ndim < 2 or len(scores) != len(pixels):
            raise EdgekitError(f"answers scores of shape {scores.shape} to {len(pixels)} images")
        return scores.reshape(len(scores), scores.size // len(scores) if len(scores) else self.classes).astype(
            numpy.float32, copy=False
        )
