"""The students that benchmarks measure on, trained once and kept in the repository with recipe and digest."""

from dataclasses import dataclass
from pathlib import Path

import numpy
import torch

from edgekit import data
from edgekit.data import Split
from edgekit.errors import EdgekitError
from edgekit.recipe import read

FOLDER = Path(__file__).parents[1] / "students"


@dataclass(frozen=True)
class Kept:
    """A run folder of which only what repeats and identifies the student is kept."""

    folder: Path

    @property
    def weights(self) -> Path:
        return self.folder / "student.safetensors"

    @property
    def images(self) -> Path:
        """100 of its test images, `picked(folder, 100, quick=False)`: for measurements with no file from elsewhere."""
        return self.folder / "images.npz"


CIFAR10 = Kept(FOLDER / "cifar10-mobilenet-cpu")


def picked(folder: Path | None, samples: int, *, quick: bool) -> Split:
    """A seeded, stratified draw of CIFAR10's test images, as `verify` draws them with seed 0.

    Args:
        folder: the images that the student was trained on; of no use where `quick` takes the repository's own.
    """
    if quick:
        with numpy.load(CIFAR10.images) as kept:
            split = Split(*(torch.from_numpy(kept[name]) for name in ("images", "labels", "index")))
        return split[:samples]
    if folder is None:
        raise EdgekitError("the images are needed", where="--data", mend="Name CIFAR-10 as a folder, or use --quick")
    spec = read(CIFAR10.folder / "recipe.toml").data.model_copy(update={"name": str(folder)})
    test = data.load(spec).test
    return test[data.stratified(test.labels, samples, 0)]
