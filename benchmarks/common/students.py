"""The students that benchmarks measure on, trained once and kept in the repository with recipe and digest."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from torch import Tensor

from edgekit import data, models
from edgekit.classifier import Classifier, predict
from edgekit.data import Split
from edgekit.errors import EdgekitError
from edgekit.files import write_json, write_text, writing_folder
from edgekit.formats import onnx as onnx_format
from edgekit.models import Network
from edgekit.quantize.qdq import quantize
from edgekit.quantize.scheme import SCHEMES
from edgekit.quantize.slim import slim
from edgekit.randomness import derive, uniform
from edgekit.recipe import Student, read, to_toml

SIZE = 32  # pixels of an untrained network's images
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


def run_folder(kept: Kept, folder: Path, data: Path) -> None:
    """A run folder of a kept student, as `edgekit distill` would have left it, for `export` and `verify`.

    Args:
        data: the images that it was trained on.
    """
    about = json.loads((kept.folder / "run.json").read_text(encoding="utf-8"))
    recipe = read(kept.folder / "recipe.toml")
    named = recipe.data.model_copy(update={"name": str(data.resolve())})
    with writing_folder(folder) as part:
        write_text(part / "recipe.toml", to_toml(recipe.model_copy(update={"data": named})))
        write_json(part / "run.json", about | {"threads": 1})
        shutil.copy(kept.weights, part / kept.weights.name)


def calibration_images(folder: Path) -> Tensor:
    """The calibration images (N, C, H, W) of the run that made CIFAR10, as `edgekit export` takes them."""
    spec = read(CIFAR10.folder / "recipe.toml").data.model_copy(update={"name": str(folder)})
    return data.load(spec).calibration.floats()


def noise(count: int, purpose: int) -> Tensor:
    """Uniform images (count, 3, 32, 32), channels-last; each `purpose` has others."""
    seeds = derive(0, purpose, 0, samples=torch.arange(count))
    return uniform(seeds, torch.empty(count, 3, SIZE, SIZE), 0.0, 1.0).contiguous(memory_format=torch.channels_last)


def untrained(architecture: str, width: float) -> Network:
    """Random weights, but the statistics of images in its normalization layers: the arithmetic is a trained one's."""
    spec = Student(architecture=architecture, width=width)
    made = models.build(spec, [str(name) for name in range(10)], (3, SIZE, SIZE), [0.5] * 3, [0.25] * 3, seed=0)
    with torch.no_grad():
        for purpose in range(3):
            made.train()(noise(64, 10 + purpose))
    return made.eval().to(memory_format=torch.channels_last)  # pyright: ignore


def int8_file(student: Network, calibration: Tensor, folder: Path) -> Path:
    """The ONNX file of `edgekit export --int8 --ptq plain`, with calibration images (N, C, H, W)."""
    model = slim(quantize(onnx_format.lower(student), calibration, SCHEMES["x86"]).model)
    onnx_format.write_model(model, folder, {})
    return folder / onnx_format.FILE


def robust(judge: Classifier, adversarial: Tensor, images: Tensor, labels: Tensor, epsilon: float) -> float:
    """Share of samples that `judge` gets right both clean and on what an L-infinity attack made of them.

    Raises:
        RuntimeError: an adversarial image lies outside the ball or the pixel range.
    """
    if (adversarial - images).abs().max() > epsilon + 1e-6 or adversarial.min() < 0 or adversarial.max() > 1:
        raise RuntimeError("an attack left the ball")
    right = predict(judge, images).argmax(1) == labels
    return (right & (predict(judge, adversarial).argmax(1) == labels)).double().mean().item()
