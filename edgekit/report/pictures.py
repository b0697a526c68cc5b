"""Images as PNG data URIs, and perturbations enlarged until they can be seen."""

import base64
import io
from typing import Any


def uri(image: Any) -> str:
    """A (C, H, W) image in [0, 1] as a data URI; one channel is grey, three are RGB, of any other count the mean."""
    import numpy
    from PIL import Image

    levels = numpy.rint(255 * numpy.clip(numpy.asarray(image, dtype=numpy.float64), 0, 1))
    if levels.shape[0] != 3:
        levels = numpy.rint(levels.mean(0, keepdims=True))
    pixels = levels.astype(numpy.uint8).transpose(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(buffer, "png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def enlarged(clean: Any, adversarial: Any, gain: float) -> Any:
    """(C, H, W) in [0, 1]: mid grey where nothing changed, `gain` times the difference around it."""
    import numpy

    difference = numpy.asarray(adversarial, dtype=numpy.float64) - numpy.asarray(clean, dtype=numpy.float64)
    return numpy.clip(0.5 + gain * difference, 0, 1)


def gain(clean: Any, adversarial: Any) -> float:
    """The factor that makes the largest difference reach black or white; 1 where nothing differs."""
    import numpy

    largest = float(numpy.abs(numpy.asarray(adversarial) - numpy.asarray(clean)).max())
    return 0.5 / largest if largest > 0 else 1.0
