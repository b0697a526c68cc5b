import base64
import io

import numpy as np
import pytest
from PIL import Image

from edgekit.report import pictures


def opened(uri):
    head, data = uri.split(",")
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "L")])
def test_a_picture_holds_the_image_rounded_to_256_levels(channels, mode):
    image = np.random.default_rng(0).random((channels, 5, 7), dtype=np.float32)
    shown = opened(pictures.uri(image))
    assert (shown.mode, shown.size) == (mode, (7, 5))
    expected = image if channels == 3 else image.mean(0, keepdims=True)
    pixels = np.asarray(shown, dtype=np.float64).reshape(5, 7, -1)
    assert np.abs(pixels / 255 - expected.transpose(1, 2, 0)).max() <= (0.5 if channels != 4 else 1) / 255 + 1e-6


def test_a_change_of_the_whole_radius_reaches_black_and_white():
    clean = np.full((3, 2, 2), 0.5, dtype=np.float32)
    change = np.array([[8 / 255, -8 / 255], [0, 4 / 255]])
    shown = pictures.enlarged(clean, clean + change, 0.5 * 255 / 8)
    assert np.allclose(shown, [[1, 0], [0.5, 0.75]], atol=1e-6)
    assert pictures.gain(clean, clean + change) == pytest.approx(0.5 * 255 / 8, rel=1e-5)
    assert pictures.gain(clean, clean) == 1
