"""Bias correction, read in the whole corrected file: every layer's mean, as ONNX Runtime computes it unfused."""

import numpy
from handmade import graph, photos, run, tensors

from edgekit.quantize import SCHEMES, Settings, quantize
from edgekit.quantize.correct import IMAGES

LAYERS = ("stem", "deep", "wide", "next", "last", "logits")


def shifts(model, made, images) -> list[numpy.ndarray]:
    """Of each layer, the error of its channels' means, in steps of its bias: half of one, and what float32 sums err."""
    found = []
    for name, expected, value in zip(
        LAYERS, run(model, images, *LAYERS), run(made, images, *LAYERS, plain=True), strict=True
    ):
        axes = (0, *range(2, value.ndim))
        error = value.mean(axes, dtype=numpy.float64) - expected.mean(axes, dtype=numpy.float64)
        found.append(numpy.abs(error / tensors(made)[f"{name}_bias_scale"]))
    return found


def test_the_mean_of_every_layer_is_the_float_one_within_half_a_step_of_its_bias():
    model, images = graph("Clip"), photos(100)
    plain = quantize(model, images, SCHEMES["x86"]).model
    corrected = quantize(model, images, SCHEMES["x86"], Settings(correct=True)).model
    for name, before, after in zip(LAYERS, shifts(model, plain, images), shifts(model, corrected, images), strict=True):
        assert after.max() < 0.7, name
        assert before.max() > 3, name
    others = [name for name in tensors(plain) if not name.endswith("_bias_quantized")]
    assert all(numpy.array_equal(tensors(plain)[name], tensors(corrected)[name]) for name in others)


def test_more_images_than_are_needed_are_drawn_evenly():
    model, images = graph(), photos(2 * IMAGES + 1)
    drawn = images[numpy.linspace(0, 2 * IMAGES, IMAGES).round().astype(int)]
    made = quantize(model, images, SCHEMES["x86"], Settings(correct=True)).model
    assert max(error.max() for error in shifts(model, made, drawn)) < 0.7


def test_a_layer_without_a_bias_gets_one_to_take_the_correction():
    model, images = graph(), photos(60)
    del model.graph.node[0].input[2]
    assert "stem_bias_quantized" not in tensors(quantize(model, images, SCHEMES["x86"]).model)
    made = quantize(model, images, SCHEMES["x86"], Settings(correct=True)).model
    assert tensors(made)["stem_bias_quantized"].any()
    assert max(error.max() for error in shifts(model, made, images)) < 0.7
