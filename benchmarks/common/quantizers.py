"""Run in .venv-peers: the int8 files that other quantizers make of an fp32 ONNX file.

    python quantizers.py fp32.onnx calibration.npy FOLDER [NAME …]

writes FOLDER/NAME.onnx for each name, of all QUANTIZERS by default. ONNX Runtime's get what its documentation says of
x86: a pre-processed model, unsigned activations with signed weights. NNCF's get its defaults, and its other preset,
whose activations are asymmetric.
"""

import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import nncf  # pyright: ignore
import numpy
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

BATCH = 16  # images that the calibration asks about at once


class Batches(CalibrationDataReader):
    def __init__(self, name: str, images: numpy.ndarray) -> None:
        self._left = iter([{name: images[start : start + BATCH]} for start in range(0, len(images), BATCH)])

    def get_next(self) -> dict[str, numpy.ndarray] | None:  # pyright: ignore
        return next(self._left, None)


def onnxruntime_static(
    source: Path, images: numpy.ndarray, made: Path, *, quant_format: QuantFormat, per_channel: bool
) -> None:
    name = onnx.load(source).graph.input[0].name
    with tempfile.TemporaryDirectory() as scratch:
        prepared = Path(scratch) / "prepared.onnx"
        quant_pre_process(source, prepared)
        quantize_static(
            prepared,
            made,
            Batches(name, images),
            quant_format=quant_format,
            per_channel=per_channel,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )


def nncf_quantize(source: Path, images: numpy.ndarray, made: Path, *, preset: nncf.QuantizationPreset | None) -> None:
    model = onnx.load(source)
    name = model.graph.input[0].name
    dataset = nncf.Dataset([{name: image[None]} for image in images])
    onnx.save(nncf.quantize(model, dataset, preset=preset, subset_size=len(images)), made)


QUANTIZERS: dict[str, Callable[[Path, numpy.ndarray, Path], None]] = {
    "ORT QDQ per tensor": partial(onnxruntime_static, quant_format=QuantFormat.QDQ, per_channel=False),
    "ORT QDQ per channel": partial(onnxruntime_static, quant_format=QuantFormat.QDQ, per_channel=True),
    "ORT QOperator per tensor": partial(onnxruntime_static, quant_format=QuantFormat.QOperator, per_channel=False),
    "ORT QOperator per channel": partial(onnxruntime_static, quant_format=QuantFormat.QOperator, per_channel=True),
    "NNCF": partial(nncf_quantize, preset=None),
    "NNCF mixed": partial(nncf_quantize, preset=nncf.QuantizationPreset.MIXED),
}


if __name__ == "__main__":
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries print; stdout is the benchmark's
    given, calibration, folder = (Path(word) for word in sys.argv[1:4])
    for quantizer in sys.argv[4:] or QUANTIZERS:
        QUANTIZERS[quantizer](given, numpy.load(calibration), folder / f"{quantizer}.onnx")
