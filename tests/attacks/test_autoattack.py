"""`autoattack` as strong as torchattacks' own, with the authors' numbers, on 64 images of the student in benchmarks."""

import json
from pathlib import Path

import numpy
import pytest
import torch

import edgekit
from edgekit import models
from edgekit.attacks import parse
from edgekit.attacks.campaign import confront
from edgekit.models.fold import fold

STUDENT = Path(edgekit.__file__).parents[1] / "benchmarks/students/cifar10-mobilenet-cpu"


@pytest.mark.timeout(1800)  # two minutes of one idle core
def test_no_more_images_withstand_it_than_withstand_torchattacks():
    torch.set_flush_denormal(True)
    peer = json.loads((STUDENT / "autoattack.json").read_text())
    with numpy.load(STUDENT / "images.npz") as kept:
        images, labels, index = (torch.from_numpy(kept[name][:64]) for name in ("images", "labels", "index"))
    images = images.float() / 255
    student = fold(models.load(STUDENT / "student.safetensors").requires_grad_(False))
    student = student.to(memory_format=torch.channels_last)
    outcome = confront(
        student, {"float": student}, parse("autoattack"), images, labels.long(), index, seed=0, epsilon=8 / 255
    )
    with torch.no_grad():
        assert int((student(images).argmax(1) == labels).sum()) == peer["clean"]
        assert (student(outcome.adversarial).argmax(1) == labels).equal(outcome.robust)
    assert (outcome.adversarial - images).abs().max() <= 8 / 255 + 1e-6
    assert outcome.adversarial.min() >= 0
    assert outcome.adversarial.max() <= 1
    # 0.3 points of 64 images are less than one image.
    assert int(outcome.robust.sum()) <= len(peer["robust"])
    assert set(outcome.robust.nonzero().squeeze(1).tolist()) <= set(peer["robust"])
