"""Run in .venv-peers: torchattacks' PGD on a student, from an .npz (images, labels) into another (adversarial)."""

import sys

import numpy
import torch
import torchattacks  # pyright: ignore

from edgekit import models

student, source, target, epsilon, steps, seed = sys.argv[1:]
torch.manual_seed(int(seed))
torch.set_flush_denormal(True)
with numpy.load(source) as archive:
    images, labels = (torch.from_numpy(archive[name]) for name in ("images", "labels"))
attack = torchattacks.PGD(
    models.load(student).requires_grad_(False),
    eps=float(epsilon),
    alpha=float(epsilon) / 4,
    steps=int(steps),
    random_start=True,
)
chunks = [attack(x, y) for x, y in zip(images.split(250), labels.split(250), strict=True)]
numpy.savez(target, adversarial=torch.cat(chunks).numpy())
