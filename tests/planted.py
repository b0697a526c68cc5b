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
# The layers that `layers` of the graph finds, in its order: two convolutions, an average over pixels, a dense one.
FIRST, SECOND, DENSE = "body.0", "body.3", "body.8"


def small(classes: int, channels: int) -> nn.Module:
    """Two convolutions and a dense layer: exported in a second."""
    return nn.Sequential(
        *(nn.Conv2d(channels, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6()),
        *(nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, classes)),
    )


def plant(network: Network, *layers: str) -> None:
    """Spoil `layers` for integers: the network's own answers do not change by a bit of importance."""
    first, normal, _, second, then, _, _, _, dense = network.body.children()  # pyright: ignore
    with torch.no_grad():
        for layer, before, weights in ((SECOND, normal, second.weight), (DENSE, then, dense.weight)):
            if layer in layers:
                before.weight[0], before.bias[0] = 0, -1  # off, whatever the image
                weights[:, 0] = 100  # each output's scale is this weight's now, and the others round to nothing
        if FIRST in layers:
            # A filter of one huge weight pair that cancels on images whose two border columns are alike.
            first.weight[:, :, :, :] *= 1


def make(folder: Path, *planted: str) -> runs.Run:
    """A finished run on the digits in `folder`, as distill leaves one; `planted` layers cannot bear eight bits."""
    run = runs.Run(folder)
    folder.mkdir(parents=True)
    run.recipe_file.write_text(
        TINY.replace('architecture = "mobilenetv2"\nwidth = 0.25', f'architecture = "{FACTORY}"')
    )
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
