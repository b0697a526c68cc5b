"""Equalized networks compute the same; what equalization is for is read in the weights and ranges themselves."""

from dataclasses import replace

import numpy
import pytest
import torch
from handmade import agreement, graph, photos, run, tensors
from onnx import helper

from edgekit.quantize import SCHEMES, Settings, quantize
from edgekit.quantize.equalize import HEADROOM, equalize, links

BY_CHANNEL = SCHEMES["x86"]
BY_TENSOR = replace(BY_CHANNEL, weights=replace(BY_CHANNEL.weights, granularity="tensor"))


def pairs(model) -> list[tuple[str, str]]:
    return [(link.first.output[0], link.second.output[0]) for link in links(model)]


def test_links_end_at_shortcuts_shared_weights_and_operators_that_are_not_homogeneous():
    model = graph()
    assert pairs(model) == [("stem", "deep"), ("deep", "wide"), ("wide", "next")]  # "next" has two readers, "last" adds
    for operator in ("Sigmoid", "HardSwish", "Softmax"):
        changed = graph()
        changed.graph.node[5].op_type = operator
        assert pairs(changed) == [("stem", "deep"), ("deep", "wide")]
    shared = graph()
    shared.graph.node[4].input[2] = "last.bias"  # the bias of "wide" is another layer's as well
    assert pairs(shared) == [("stem", "deep")]
    lifted = graph("Clip")
    lifted.graph.node[5].input[1] = "six"  # cut at another number than zero below
    assert pairs(lifted) == [("stem", "deep"), ("deep", "wide")]


@pytest.mark.parametrize("scheme", [BY_CHANNEL, BY_TENSOR])
def test_with_relu_the_function_stays_the_same_on_images_that_were_never_seen(scheme):
    model, images = graph(huge=300), photos(200, seed=5)
    made = equalize(model, photos(40), scheme)
    (before,), (after,) = run(model, images), run(made, images)
    assert numpy.abs(before - after).max() < 1e-4 * numpy.abs(before).max()
    assert numpy.abs(tensors(made)["wide.weight"] - tensors(model)["wide.weight"]).max() > 1


def test_by_tensor_the_channels_of_neighbouring_weights_become_alike():
    """Equation 11 of the paper: range 1 of channel i and range 2 of channel i are equal at the end."""
    after = tensors(equalize(graph(huge=300), photos(40), BY_TENSOR))
    rows = numpy.abs(after["wide.weight"]).reshape(24, -1).max(1)
    columns = numpy.abs(after["next.weight"]).max((0, 2, 3))
    assert rows == pytest.approx(columns, rel=0.02)
    deep = numpy.abs(after["deep.weight"]).reshape(16, -1).max(1)
    assert deep == pytest.approx(numpy.abs(after["stem.weight"]).reshape(16, -1).max(1), rel=0.02)
    assert deep == pytest.approx(numpy.abs(after["wide.weight"]).max((0, 2, 3)), rel=0.02)


def test_by_channel_the_ranges_of_an_activation_come_closer():
    model, images = graph(huge=300), photos(40)
    made = equalize(model, images, BY_CHANNEL)
    spread = []
    for each in (model, made):
        peak = run(each, images, "wide_act")[0].max((0, 2, 3))
        spread.append(peak.max() / numpy.median(peak))
    assert spread[1] < 0.1 * spread[0]
    # The same share of the range and of the weights that read it, channel by channel: equation 11 with other ranges.
    peak = run(made, images, "wide_act")[0].max((0, 2, 3))
    ratio = peak / numpy.abs(tensors(made)["next.weight"]).max((0, 2, 3))
    assert ratio[peak > 0] == pytest.approx(numpy.median(ratio[peak > 0]), rel=0.02)
    assert numpy.array_equal(tensors(made)["stem.weight"], tensors(model)["stem.weight"])  # read by a depthwise layer


def test_with_clip_no_channel_passes_the_bound_and_one_that_reaches_it_stays():
    model, images = graph("Clip"), photos(64)
    for name in ("stem", "deep", "wide"):  # some channels small, some that are cut at six
        for tensor in model.graph.initializer:
            if tensor.name.startswith(f"{name}."):
                value = tensors(model)[tensor.name].copy()
                factor = numpy.linspace(0.05, 8, len(value)).reshape(-1, *[1] * (value.ndim - 1))
                tensor.raw_data = (value * factor).astype("float32").tobytes()
    for scheme in (BY_CHANNEL, BY_TENSOR):
        made = equalize(model, images, scheme)
        (before,), (after,) = run(model, images), run(made, images)
        assert numpy.abs(before - after).max() < 1e-4 * numpy.abs(before).max()
        grown = 0
        for first, name in ((one.first.output[0], one.first.input[1]) for one in links(model)):
            peak = run(model, images, first)[0].max((0, 2, 3))
            old, new = (numpy.abs(tensors(each)[name]).reshape(len(peak), -1) for each in (model, made))
            place = old.argmax(1)[:, None]
            moved = numpy.take_along_axis(new, place, 1)[:, 0] / numpy.take_along_axis(old, place, 1)[:, 0]
            if first != "stem":  # its own inputs were divided as well
                continue
            assert moved[peak >= 6] == pytest.approx(1, rel=1e-5)
            assert ((moved <= 1 + 1e-5) | (moved * peak * HEADROOM <= 6 * (1 + 1e-5))).all()
            grown += int((moved > 1.5).sum())
        assert grown if scheme is BY_TENSOR else not grown


def test_one_huge_channel_ruins_weights_by_tensor_and_equalization_mends_them():
    model, images, unseen = graph(huge=500), photos(64), photos(300, seed=7)
    plain, mended = (quantize(model, images, BY_TENSOR, Settings(equalize=mend)).model for mend in (False, True))
    assert tensors(plain)["wide.weight_scale"].shape == ()
    assert agreement(model, plain, unseen) < 0.75
    assert agreement(model, mended, unseen) > 0.95


def test_a_network_without_links_is_left_alone():
    model = graph()
    for node in model.graph.node:
        if node.op_type == "Relu":
            node.op_type = "Sigmoid"
    made = equalize(model, torch.rand(4, 3, 8, 8), BY_TENSOR)
    assert made.SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)
    assert helper.printable_graph(made.graph) == helper.printable_graph(model.graph)
