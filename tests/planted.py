"""Students in which chosen layers cannot bear eight bits: one input channel is never on, and its weights are huge."""

from pathlib import Path

import torch
from commandline import TINY
from torch import nn

from edgekit import data, models, runs
from edgekit.files import sha256
from edgekit.models import Network
from edgekit.recipe import read

FACTORY = f"{__name__}:small"
SECOND, DENSE = "body.3", "body.8"  # layers that can be planted; "body.0" and "mean_1" are the others


def small(classes: int, channels: int) -> nn.Module:
    """Two convolutions and a dense layer: exported in a second."""
    return nn.Sequential(
        *(nn.Conv2d(channels, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6()),
        *(nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, classes)),
    )


def plant(network: Network, *layers: str) -> None:
    """Spoil `layers` for integers; the network's own answers stay as if their first input channel were missing."""
    modules = dict(network.named_modules())
    with torch.no_grad():
        for layer, normalization in ((SECOND, "body.1"), (DENSE, "body.4")):
            if layer in layers:
                modules[normalization].weight[0], modules[normalization].bias[0] = 0, -1  # pyright: ignore
                # The scale of every output is now this weight's, and the others round to nothing.
                modules[layer].weight[:, 0] = 100  # pyright: ignore


def make(folder: Path, *planted: str) -> runs.Run:
    """A finished run on the digits in `folder`, as distill leaves one; `planted` layers cannot bear eight bits."""
    run = runs.Run(folder)
    folder.mkdir(parents=True)
    student = f'architecture = "{FACTORY}"'
    run.recipe_file.write_text(TINY.replace('architecture = "mobilenetv2"\nwidth = 0.25', student))
    recipe = read(run.recipe_file)
    dataset = data.load(recipe.data)
    network = models.build(recipe.student, dataset.classes, dataset.input_shape, *dataset.statistics(), 0)
    optimizer = torch.optim.Adam(network.parameters(), 0.02)
    for _ in range(60):
        loss = nn.functional.cross_entropy(network(dataset.train.floats()), dataset.train.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    plant(network.eval(), *planted)
    models.save(network, run.student)
    about = {"status": "finished", "seed": 0, "threads": 1, "data": {"sha256": dataset.sha256}}
    run.save_info(about | {"student_sha256": sha256(run.student)})
    return run
