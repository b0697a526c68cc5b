"""A torchvision network through torch's and ONNX Runtime's own tools, and then through one command of edgekit.

Nothing of edgekit makes these files: `torch.onnx.export`, either exporter; `onnxruntime.quantization`, all three forms.
"""

import json
import logging
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess

import numpy
import pytest
import torch
from commandline import command
from PIL import Image
from torch import Tensor, nn
from torchnets import export, prepared
from torchvision import models

KEPT = Path(__file__).parents[2] / "benchmarks/students/cifar10-mobilenet-cpu/images.npz"
SIZE, COUNT, EPSILON = 32, 40, 1 / 255
FILES = [(exporter, form) for exporter in ("torchscript", "dynamo") for form in ("QDQ", "QOperator", "dynamic")]


def photographs() -> tuple[Tensor, Tensor]:
    """100 images of CIFAR-10, (100, 3, 32, 32) in [0, 1], and their labels (100,)."""
    with numpy.load(KEPT) as kept:
        return torch.from_numpy(kept["images"]).float() / 255, torch.from_numpy(kept["labels"])


def fitted(images: Tensor, labels: Tensor) -> nn.Module:
    """ShuffleNetV2 with random weights and a last layer by ridge regression on its features: right on most of them."""
    network = prepared(lambda: models.shufflenet_v2_x0_5(num_classes=10), SIZE)
    seen: list[Tensor] = []
    last = network.get_submodule("fc")
    assert isinstance(last, nn.Linear)
    hook = last.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        network(images)
        hook.remove()
        centred = seen[0] - seen[0].mean(0)
        spread = centred.std(0).clamp(min=1e-6)
        scaled, target = centred / spread, 5 * (nn.functional.one_hot(labels, 10) - 0.1)
        inside = scaled @ scaled.T + 10 * torch.eye(len(images))
        last.weight.copy_((scaled.T @ torch.linalg.solve(inside, target)).T / spread)
        last.bias.copy_(-(last.weight @ seen[0].mean(0)))
        assert network(images).argmax(1).eq(labels).float().mean() > 0.95
    return network


@dataclass
class Desk:
    """A folder with photos and, for either exporter, a float file."""

    place: Path
    images: Tensor
    labels: Tensor

    def quantized(self, exporter: str, form: str) -> Path:
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_dynamic, quantize_static

        class Reader(CalibrationDataReader):
            left: Iterator[dict[str, numpy.ndarray]] = iter({"x": batch.numpy()} for batch in self.images.split(20))

            def get_next(self) -> dict[str, numpy.ndarray] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
                return next(self.left, None)

        source, made = self.place / f"{exporter}.onnx", self.place / f"{exporter}-{form}.onnx"
        logging.disable(logging.WARNING)  # it asks for a shape inference beforehand
        try:
            if form == "dynamic":
                quantize_dynamic(source, made)
            else:
                quantize_static(source, made, Reader(), quant_format=QuantFormat[form])
        finally:
            logging.disable(logging.NOTSET)
        return made

    def answers(self, path: Path, images: Tensor, batch: int) -> Tensor:
        """What ONNX Runtime says by itself, (N, 10), asked in batches of `batch`."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        made = [numpy.asarray(session.run(None, {"x": some.numpy()})[0]) for some in images.split(batch)]
        return torch.from_numpy(numpy.concatenate(made))


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    place = tmp_path_factory.mktemp("plain")
    images, labels = photographs()
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = place / "photos" / str(int(label))
        folder.mkdir(parents=True, exist_ok=True)
        pixels = (255 * image).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{number:03}.png")
    network = fitted(images, labels)
    for exporter, dynamo in (("torchscript", False), ("dynamo", True)):
        export(network, place / f"{exporter}.onnx", SIZE, dynamo=dynamo)
    return Desk(place, images, labels)


@pytest.fixture(scope="module")
def commands(desk: Desk) -> dict[Path, Future[CompletedProcess[str]]]:
    """The six files, each verified by one command, two at a time: most of a command is its start."""
    words = ["--data", "photos", "--attack", "pgd20", "--epsilon", "1/255", "--samples", COUNT, "--json"]
    files = [desk.quantized(exporter, form) for exporter, form in FILES]
    with ThreadPoolExecutor(2) as pool:
        return {
            path: pool.submit(
                command, "verify", path.name, *words, "--save-adversarial", path.with_suffix(".npz"), cwd=desk.place
            )
            for path in files
        }


@pytest.mark.parametrize(("exporter", "form"), FILES)
def test_one_command_verifies_it(desk: Desk, commands, exporter: str, form: str) -> None:
    path = desk.place / f"{exporter}-{form}.onnx"
    done = commands[path].result()
    assert done.returncode == 0, done.stderr
    verdict = json.loads(done.stdout)
    (one,) = verdict["artifacts"]
    assert (verdict["verdict"], one["precision"], verdict["samples"]) == ("measured", "int8", COUNT)
    (attack,) = one["attacks"]
    assert set(attack["sources"]) == {"twin"}
    assert one["twin"]["agreement"] >= 0.99
    checks = {check["name"]: check["passed"] for check in one["checks"]}
    assert all(checks.values()), checks
    assert {"twin_fidelity", "fooled_replayed", "same_answer_twice", "epsilon_zero_is_clean"} <= set(checks)
    assert {"huge_epsilon_fools", "gradients_reach_the_input", "gradient_free_is_weaker"} <= set(checks)

    # Asked again without edgekit, one image at a time as it is deployed.
    with numpy.load(path.with_suffix(".npz")) as archive:
        kept = {name: torch.from_numpy(archive[name]) for name in ("images", "labels")}
        moved, fooled = (torch.from_numpy(archive[f"{path.stem}/{name}"]) for name in ("adversarial", "fooled"))
    assert (moved - kept["images"]).abs().max() <= EPSILON + 1e-6
    clean, attacked = (desk.answers(path, images, 1) for images in (kept["images"], moved))
    # Where pairs of weights can saturate, both arithmetics judged; the archive holds what this machine's did.
    native = one if isinstance(one["judged_on"], str) else one["judged_on"][0]
    assert native["clean_accuracy"]["value"] == clean.argmax(1).eq(kept["labels"]).double().mean().item()
    assert attacked.argmax(1).ne(kept["labels"]).equal(fooled)
    assert native["robust_accuracy"]["value"] == (~fooled).double().mean().item()
    assert one["robust_accuracy"]["value"] < one["clean_accuracy"]["value"] - 0.3
    together = desk.answers(path, moved, len(moved))
    # One range for the whole batch: had the file been judged in batches, these would be other answers.
    assert together.equal(attacked) is (form != "dynamic")
