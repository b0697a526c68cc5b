"""The choice among candidates: what is measured, what decides, and that nothing is carried from one to another."""

import numpy
import pytest
import torch
from handmade import graph, photos, run, tensors

from edgekit.quantize import CANDIDATES, SCHEMES, Evidence, Measured, Settings, quantize, select
from edgekit.quantize.choice import best

SCHEME = SCHEMES["x86"]


def evidence(model) -> Evidence:
    clean, adversarial = photos(80, seed=3), (photos(80, seed=3) + 0.05 * torch.rand(80, 3, 8, 8)).clamp(0, 1)
    expected = [torch.from_numpy(run(model, images)[0]) for images in (clean, adversarial)]
    return Evidence(photos(60), photos(20, seed=9) * 1.2, clean, adversarial, (expected[0], expected[1]))


def test_the_best_file_is_returned_and_each_is_what_quantize_makes_of_its_settings_alone():
    model = graph("Clip")
    given = evidence(model)
    candidates = [CANDIDATES[0], *CANDIDATES[3::2]]
    assert {(one.equalize, one.adversarial) for one in candidates} == {(False, False), (True, False), (True, True)}
    made, measured = select(model, SCHEME, given, candidates)
    assert [one.settings for one in measured] == candidates
    files = []
    for one in measured:
        images = torch.cat([given.calibration, given.attacked]) if one.settings.adversarial else given.calibration
        alone = quantize(model, images, SCHEME, one.settings).model
        files.append(alone.SerializeToString(deterministic=True))
        for place, (images, expected) in enumerate(zip((given.clean, given.adversarial), given.expected, strict=True)):
            answered = run(alone, images)[0]
            agreement = (answered.argmax(1) == expected.numpy().argmax(1)).mean()
            assert one.agreement[place] == pytest.approx(agreement)
            assert one.error[place] == pytest.approx(numpy.abs(answered - expected.numpy()).mean(), rel=1e-4)
    assert len(set(files)) == len(files)
    chosen = best(measured, 160)
    assert made.model.SerializeToString(deterministic=True) == files[chosen]
    assert measured[chosen].settings.record().items() <= made.calibration.items()
    assert set(measured[0].record()) == {
        "method",
        "adversarial",
        "equalize",
        "correct",
        "weights",
        "agreement",
        "error",
    }


def figures(agreement: float, error: float) -> Measured:
    return Measured(Settings(), (agreement, agreement), (error, error))


def test_what_images_cannot_tell_apart_the_logits_do():
    """One standard error of 0.98 over 800 images is 0.5 points."""
    assert best([figures(0.98, 0.3), figures(0.977, 0.2), figures(0.97, 0.1)], 800) == 1
    assert best([figures(0.98, 0.3), figures(0.977, 0.2), figures(0.97, 0.1)], 80_000) == 0
    assert best([figures(1.0, 0.3), figures(1.0, 0.2), figures(0.999, 0.1)], 800) == 1
    assert best([figures(0.5, 0.3), figures(0.5, 0.3)], 800) == 0  # of equals the first, the plainest


def test_adversarial_images_widen_the_ranges_only_where_they_are_asked_for():
    model, images = graph(), photos(60)
    both = torch.cat([images, images * 2])
    memo = {}
    clean = quantize(model, images, SCHEME, Settings(), memo).model
    wide = quantize(model, both, SCHEME, Settings(adversarial=True), memo)
    again = quantize(model, images, SCHEME, Settings(), memo).model
    assert tensors(wide.model)["wide_act_scale"] > tensors(clean)["wide_act_scale"]
    assert again.SerializeToString(deterministic=True) == clean.SerializeToString(deterministic=True)
    assert (wide.calibration["images"], wide.calibration["adversarial"]) == (120, True)
