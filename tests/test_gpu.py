"""What must hold on a GPU as on the CPU; skipped where there is none."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from commandline import TINY, command
from networks import network, photos

from edgekit.attacks import ATTACKS, parse
from edgekit.attacks.campaign import confront
from edgekit.attacks.norms import NORMS
from edgekit.classifier import predict
from edgekit.errors import EdgekitError
from edgekit.methods.inner import Inner
from edgekit.methods.rslad import rslad
from edgekit.methods.trades import trades
from edgekit.models.fold import fold
from edgekit.randomness import derive

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
EPSILON = 8 / 255


@pytest.fixture(autouse=True)
def _exact():
    """TF32 rounds to 10 bits: a comparison with the CPU needs whole float32 products."""
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = True


def lines(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.mark.parametrize("method", [rslad, trades], ids=["rslad", "trades"])
def test_a_loss_and_its_gradients_are_those_of_the_cpu(method):
    images, labels, seeds = photos(16), torch.arange(16) % 10, derive(0, samples=torch.arange(16))
    losses, gradients = {}, {}
    for device in ("cpu", "cuda"):
        student, teacher = network().to(device).train(), network(seed=1).to(device).requires_grad_(False)
        # No step of the inner attack: where a gradient is next to 0, its sign is a matter of rounding.
        inner = Inner(EPSILON, 2 / 255, 0)
        loss = method(student, teacher, images.to(device), labels.to(device), inner=inner, seeds=seeds).mean()
        loss.backward()
        losses[device] = loss.item()
        gradients[device] = torch.cat([p.grad.flatten().cpu() for p in student.parameters() if p.grad is not None])
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-4)
    cosine = torch.nn.functional.cosine_similarity(gradients["cpu"], gradients["cuda"], dim=0)
    assert cosine > 0.999


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", [name for name in ATTACKS if "100x5" not in name])
def test_every_attack_runs_there_and_finds_about_what_it_finds_on_the_cpu(name, norm):
    images, epsilon = photos(64), {"Linf": EPSILON, "L2": 0.5}[norm]
    (attack,) = parse(name, norm)
    labels = predict(network(), images).argmax(1)
    robust = {}
    for device in ("cpu", "cuda"):
        judge, near = fold(network().to(device)), fold(network(seed=1).to(device))
        # DIVA follows two networks at once, and tells them apart.
        sources = {"float": near, "twin": judge} if attack.needs else {"float": judge}
        where = [part.to(device) for part in (images, labels, torch.arange(64))]
        outcome = confront(judge, sources, [attack], *where, seed=0, epsilon=epsilon)
        away = NORMS[norm].length((outcome.adversarial - where[0]).cpu())
        assert outcome.adversarial.device.type == device
        assert away.max() <= epsilon + 1e-5 and outcome.adversarial.min() >= 0 and outcome.adversarial.max() <= 1
        assert torch.equal(outcome.robust, predict(judge, outcome.adversarial).argmax(1) == where[1])
        robust[device] = outcome.robust.sum().item()
    assert abs(robust["cuda"] - robust["cpu"]) <= 3


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_trained_there_is_exported_and_verified(precision, tmp_path):
    (tmp_path / "tiny.toml").write_text(TINY)
    done = command("distill", "tiny.toml", "--device", "cuda", "--set", f"train.precision={precision}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = json.loads((tmp_path / "runs" / "latest" / "run.json").read_text())
    assert run["device"].startswith("cuda")
    assert numpy.isfinite([line["loss"] for line in lines(tmp_path / "runs" / "latest" / "log.jsonl")]).all()
    for arguments in (["export", "--int8"], ["verify", "--attack", "pgd20", "--samples", "50", "--json"]):
        done = command(*arguments, cwd=tmp_path)
        assert done.returncode in (0, 3), done.stderr
    assert {one["name"] for one in json.loads(done.stdout)["artifacts"]} >= {"onnx-fp32", "onnx-int8"}


def test_a_run_that_was_interrupted_there_goes_on_there(tmp_path):
    (tmp_path / "tiny.toml").write_text(TINY)
    whole = command("distill", "tiny.toml", "--device", "cuda", "--run", "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    epochs = len(lines(tmp_path / "whole" / "log.jsonl"))
    (tmp_path / "stop.py").write_text(
        "import sys, edgekit.train as train\n"
        "from edgekit.cli import main\n"
        "kept, seen = train._save_checkpoint, []\n"
        "def save(*rest):\n"
        "    kept(*rest); seen.append(1)\n"
        "    if len(seen) == 1: raise KeyboardInterrupt\n"
        "train._save_checkpoint = save\n"
        "sys.argv = ['edgekit', 'distill', 'tiny.toml', '--device', 'cuda', '--run', 'half']\n"
        "main()\n"
    )
    stopped = subprocess.run([sys.executable, "stop.py"], cwd=tmp_path, capture_output=True, text=True)
    assert stopped.returncode == 130, stopped.stderr
    again = command("distill", "tiny.toml", "--run", "half", "--resume", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "half" / "run.json").read_text())["device"].startswith("cuda")
    assert [line["epoch"] for line in lines(tmp_path / "half" / "log.jsonl")] == list(range(1, epochs + 1))


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from edgekit import quantize
    from edgekit.formats import onnx, tensorrt

    pytest.importorskip(tensorrt._MODULE)
    student, folder = network(), tmp_path_factory.mktemp("engines")
    for precision in tensorrt.PRECISIONS:
        (folder / precision).mkdir()
        model = onnx.lower(student)
        if precision == "int8":
            model = quantize.quantize(model, photos(64), quantize.SCHEMES["symmetric"]).model
        tensorrt.write_model(model, folder / precision, {}, precision)
    return folder


@pytest.mark.parametrize(("precision", "allowed"), [("fp32", 1e-4), ("fp16", 0.02), ("int8", 0.2)])
def test_a_tensorrt_engine_answers_as_its_graph(engines: Path, precision: str, allowed: float):
    from edgekit import judge
    from edgekit.formats import onnx, tensorrt

    assert tensorrt.lacking() is None
    images = photos(100)  # more than a batch of its profile
    path = engines / precision / tensorrt.FILE
    if precision == "int8":
        expected = onnx.open(path.with_name("twin.onnx"), threads=1, optimization="none")(images)
    else:
        expected = predict(network(), images)
    spread = (expected.max() - expected.min()).item()
    opened = tensorrt.open(path)
    answered = opened(images)
    assert answered.device.type == "cpu" and answered.dtype == torch.float32
    assert (answered - expected).abs().max() < allowed * spread
    there = opened(images[:7].cuda())
    assert there.device.type == "cuda" and (there.cpu() - expected[:7]).abs().max() < allowed * spread
    assert opened(images[:0]).shape == (0, 10)
    isolated = judge.open(path, trust=True)  # in a child, as verify does
    assert torch.allclose(isolated(images[:9]), answered[:9], atol=1e-3 * spread)
    with pytest.raises(EdgekitError, match="takes images of the shape"):
        opened(torch.zeros(1, 3, 8, 8))


def test_a_damaged_engine_is_one_sentence_there_too(engines: Path, tmp_path: Path):
    from edgekit.formats import tensorrt

    data = bytearray((engines / "fp32" / tensorrt.FILE).read_bytes())
    data[64:4096] = bytes(4032)
    (tmp_path / tensorrt.FILE).write_bytes(data)
    with pytest.raises(EdgekitError, match="TensorRT does not take the file"):
        tensorrt.open(tmp_path / tensorrt.FILE)


def test_a_run_exports_engines_that_are_compared_and_verified(tmp_path: Path):
    from edgekit.formats import tensorrt

    pytest.importorskip(tensorrt._MODULE)
    (tmp_path / "tiny.toml").write_text(TINY)
    for arguments in (
        ["distill", "tiny.toml"],
        ["export", "--int8", "--fp16", "--format", "tensorrt", "--ptq", "plain", "--json"],
        ["verify", "--attack", "pgd5", "--samples", "50", "--json"],
    ):
        done = command(*arguments, cwd=tmp_path)
        assert done.returncode in (0, 1, 3), done.stderr
    judged = json.loads(done.stdout)["artifacts"]
    assert {one["name"] for one in judged} == {"tensorrt-fp32", "tensorrt-int8", "tensorrt-fp16"}
    assert not any(one["verdict"] == "not_run" for one in judged)
