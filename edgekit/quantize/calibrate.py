"""The range of every activation over the calibration images."""

from collections.abc import Iterable

import numpy
import onnx
import onnxruntime
from torch import Tensor


def ranges(
    model: onnx.ModelProto, tensors: Iterable[str], images: Tensor, batch: int = 64
) -> dict[str, tuple[float, float]]:
    """Smallest and largest value of each of `tensors` while the fp32 `model` answers `images` (N, C, H, W)."""
    names = list(tensors)
    if not names:
        return {}  # a session without outputs cannot be asked
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    probe.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = {name: (numpy.inf, -numpy.inf) for name in names}
    for chunk in images.split(batch):
        for name, value in zip(
            names, session.run(names, {probe.graph.input[0].name: chunk.contiguous().numpy()}), strict=True
        ):
            low, high = found[name]
            array = numpy.asarray(value)
            found[name] = (min(low, float(array.min())), max(high, float(array.max())))
    return found
