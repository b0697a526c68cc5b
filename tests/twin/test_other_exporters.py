"""Files that tf2onnx and paddle2onnx wrote (foreign/make_*.py): the twin is the file, one command verifies it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy
import onnx
import pytest
import torch
from networks import photos
from onnxfiles import draw, runtime
from PIL import Image
from torch import Tensor

from edgekit import foreign, verifier
from edgekit.foreign import Port, Ported, Said

FILES = {path.stem: path for path in sorted((Path(__file__).parent / "foreign").glob("*.onnx"))}
# int8 file -> the float file of the same weights, and how near its gradients must be (cosine, median over images). The
# file with pools multiplies an 8-bit activation by up to 39: it decides otherwise than its float network on a quarter.
INTEGERS = {
    "tf2onnx-lite-int8-squeeze-15": ("tf2onnx-squeeze-11", 0.99),
    "tf2onnx-lite-int8-mobilenet-13": ("tf2onnx-mobilenet-9", 0.93),
    "tf2onnx-lite-int8-pools-13": ("tf2onnx-pools-15", 0.8),
    "tf2onnx-lite-uint8-upsampled-13": ("tf2onnx-upsampled-nchw-17", 0.96),
    "tf2onnx-qat-13": ("", 0.95),  # its own graph without the nodes that round
}
FLOATS = [name for name in FILES if name not in INTEGERS]
COUNT = 12


@dataclass
class Pair:
    """One file twice: its twin behind its port, and ONNX Runtime, which knows nothing of either."""

    path: Path
    port: Port
    copy: Ported

    def images(self, count: int) -> Tensor:
        """(N, 3, H, W) in [0, 1]: noise, smooth ones and constants, a third of each; of a file for bytes, bytes."""
        size = self.port.height or 0
        third = count // 3
        noise, colour = torch.from_numpy(numpy.random.default_rng(1).random((2, count, 3, size, size), numpy.float32))
        made = torch.cat(
            [noise[: count - 2 * third], photos(third, size, seed=2), colour[:third, :, :1, :1] + 0 * noise[:third]]
        )
        return (255 * made).round() / 255 if self.port.element == "uint8" else made

    def scores(self, images: Tensor) -> Tensor:
        """What the runtime says, logarithms where that is probabilities, (N, 10)."""
        eaten = self.port.eat(images).contiguous()
        batch = self.copy.raw.batch or len(images)  # pyright: ignore
        answers = torch.cat(
            [runtime(self.path, some.round() if self.port.element == "uint8" else some) for some in eaten.split(batch)]
        )
        return answers.float().clamp(min=1e-30).log() if self.port.probabilities else answers

    def twin(self, images: Tensor) -> Tensor:
        scores = self.copy(images)
        return scores.log_softmax(1) if self.port.probabilities else scores


def pair(path: Path) -> Pair:
    port = foreign.port(path, foreign.read(path), Said())
    copy = foreign.twin(path, port)
    assert copy is not None
    return Pair(path, port, copy)


def gradients(one: Pair, images: Tensor, weights: Tensor) -> Tensor:
    x = images.clone().requires_grad_()
    return torch.autograd.grad((one.twin(x) * weights).sum(), x)[0]


def unrounded(path: Path, place: Path) -> Path:
    """The file without QuantizeLinear and DequantizeLinear: the float network of a file whose weights are floats."""
    model = onnx.load(path)
    rounders = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    for rounder in rounders:
        rounder.op_type = "Identity"
        del rounder.input[1:], rounder.attribute[:]
    onnx.save(model, place)
    return place


def test_both_exporters_are_there() -> None:
    assert len(FLOATS) >= 10 and INTEGERS.keys() <= FILES.keys()
    assert {name.split("-")[0] for name in FILES} == {"tf2onnx", "paddle"}
    assert {onnx.load(path).opset_import[0].version for path in FILES.values()} >= {9, 11, 13, 15, 17}


@pytest.mark.parametrize("name", FLOATS)
def test_a_float_file_answers_as_in_onnx_runtime(name: str) -> None:
    one = pair(FILES[name])
    images = one.images(30)
    theirs = one.scores(images)
    spread = theirs.std().item()
    assert spread > 0.5 and len(theirs.argmax(1).unique()) > 3  # no file here answers all images alike
    mine = one.twin(images)
    if one.port.probabilities:  # the smallest are lost in the runtime's softmax
        mine, theirs = mine.clamp(min=-20), theirs.clamp(min=-20)
    assert mine.allclose(theirs, atol=1e-4 * spread, rtol=0)


@pytest.mark.parametrize("name", INTEGERS)
def test_an_int8_file_decides_as_in_onnx_runtime(name: str) -> None:
    one = pair(FILES[name])
    images = one.images(600)
    theirs = one.scores(images)
    assert len(theirs.argmax(1).unique()) > 3
    assert one.copy(images).argmax(1).eq(theirs.argmax(1)).float().mean() >= 0.995


@pytest.mark.parametrize("name", FLOATS)
def test_the_gradients_of_a_float_file_are_differences(name: str) -> None:
    """Of ONNX Runtime's answers, as near as float32 tells; in float64 of the twin's own, which are those answers."""
    one = pair(FILES[name])
    images = one.images(30)[:20]  # without the constant ones, whose pools have nothing but ties
    weights = torch.from_numpy(draw(len(images), 10, seed=3))
    gradient = gradients(one, images, weights)
    direction = torch.from_numpy(draw(*images.shape, seed=4)).sign()
    found = (gradient * direction).flatten(1).sum(1)

    def expected(answers: Callable[[Tensor], Tensor], images: Tensor, step: float) -> Tensor:
        ahead, behind = (answers(images + sign * step * direction) for sign in (1, -1))
        return (((ahead - behind) * weights).sum(1) / (2 * step)).float()

    # Of so many pixels some drive a ReLU or a maximum across its border, however small the step.
    theirs = expected(one.scores, images, 2e-4)
    assert (found - theirs).norm() < 0.1 * theirs.norm()
    one.copy.raw.double()  # pyright: ignore
    own = expected(one.twin, images.double(), 1e-5)
    assert (found - own).norm() < 0.03 * own.norm()
    assert (found - own).abs().median() < 0.005 * own.abs().median()


@pytest.mark.parametrize("name", INTEGERS)
def test_the_gradients_of_an_int8_file_are_those_of_its_float_network(tmp_path: Path, name: str) -> None:
    other, least = INTEGERS[name]
    one = pair(FILES[name])
    network = pair(FILES[other] if other else unrounded(FILES[name], tmp_path / "float.onnx"))
    images, weights = one.images(60)[:40], torch.from_numpy(draw(40, 10, seed=3))
    mine, theirs = (gradients(each, images, weights) for each in (one, network))
    assert torch.cosine_similarity(mine.flatten(1), theirs.flatten(1)).median() > least
    assert 0.9 < mine.norm() / theirs.norm() < 1.1


def desk(one: Pair, place: Path) -> None:
    """Photos in the folder of the class that the file says they are, and the names of all classes."""
    (place / "classes.txt").write_text("\n".join(f"class {number}" for number in range(10)))
    images = (255 * one.images(COUNT)).round()
    for number, (image, label) in enumerate(zip(images, one.scores(images / 255).argmax(1).tolist(), strict=True)):
        folder = place / "photos" / f"class {label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.byte().permute(1, 2, 0).numpy()).save(folder / f"{number:03}.png")


def judged(verdict: dict, name: str) -> None:
    (artifact,) = verdict["artifacts"]
    (attack,) = artifact["attacks"]
    assert (verdict["verdict"], verdict["samples"], set(attack["sources"])) == ("measured", COUNT, {"twin"})
    assert artifact["precision"] == ("int8" if name in INTEGERS else "fp32")
    assert artifact["clean_accuracy"]["value"] == 1  # fed as the runtime is above: layout, levels, order of classes
    assert artifact["robust_accuracy"]["value"] < 0.8
    assert artifact["twin"]["agreement"] >= 0.99
    checks = {check["name"]: check["passed"] for check in artifact["checks"]}
    assert checks["twin_fidelity"] and checks["fooled_replayed"] and checks["same_answer_twice"]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("paddle-attention-17", "NCHW, 16 x 16, in [0, 1]"),
        ("tf2onnx-qat-13", "NHWC, 32 x 32, in [0, 1]"),
    ],
)
def test_it_is_verified_with_nothing_said_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, found: str
) -> None:
    monkeypatch.chdir(tmp_path)
    desk(pair(FILES[name]), tmp_path)
    verdict = verifier.verify(FILES[name], data="photos", classes="classes.txt", attack="pgd20", epsilon="4/255")
    judged(verdict, name)
    said = capsys.readouterr().err
    assert found in said and "it answers probabilities" in said
