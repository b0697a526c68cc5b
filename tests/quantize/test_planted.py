"""A planted bad quantization: verify finds it in the file, and equalization mends it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commandline import TINY
from torch import nn

from edgekit import artifact, data, models, quantize, runs
from edgekit.attacks.losses import cross_entropy
from edgekit.exporter import export
from edgekit.files import sha256
from edgekit.methods.inner import Inner
from edgekit.randomness import derive
from edgekit.recipe import read
from edgekit.verifier import verify

HUGE = 2000


def rectified(classes: int, channels: int) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(channels, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 1, 1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, classes)),
    )


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> runs.Run:
    """A run whose student is robust, and computes what it learnt with one huge channel."""
    run = runs.Run(tmp_path_factory.mktemp("runs") / "planted-1")
    run.folder.mkdir()
    factory = f'architecture = "{__name__}:rectified"'
    run.recipe_file.write_text(TINY.replace('architecture = "mobilenetv2"\nwidth = 0.25', factory))
    recipe = read(run.recipe_file)
    dataset = data.load(recipe.data)
    student = models.build(recipe.student, dataset.classes, dataset.input_shape, *dataset.statistics(), 0)
    attack, optimizer = Inner(0.05, 0.05, 1), torch.optim.Adam(student.parameters(), 0.01)
    for step in range(200):
        batch = dataset.train[derive(step, samples=torch.arange(64)) % len(dataset.train)]
        images, labels = batch.floats(), batch.labels
        seeds = derive(step, samples=batch.index)
        hard = attack(student, images, lambda logits, labels=labels: cross_entropy(logits, labels), seeds, spread=True)
        optimizer.zero_grad()
        cross_entropy(student(hard), labels).mean().backward()
        optimizer.step()
    first, second = (module for module in student.body.modules() if isinstance(module, nn.Conv2d))
    with torch.no_grad():
        assert first.bias is not None
        first.weight[0] *= HUGE
        first.bias[0] *= HUGE
        second.weight[:, 0] /= HUGE
    models.save(student, run.student)
    about = {"status": "finished", "seed": 0, "threads": 1, "data": {"sha256": dataset.sha256}}
    run.save_info(about | {"student_sha256": sha256(run.student)})
    return run


def test_verify_finds_one_huge_channel_quantized_by_tensor_and_equalization_mends_it(
    planted: runs.Run, monkeypatch: pytest.MonkeyPatch
):
    scheme = quantize.SCHEMES["x86"]
    by_tensor = replace(scheme, weights=replace(scheme.weights, granularity="tensor"))
    monkeypatch.setitem(quantize.SCHEMES, "x86", by_tensor)
    for ptq in ("plain", "tuned"):
        export(planted.folder, int8=True, formats="onnx", label=ptq, ptq=ptq)
    verdicts = {}
    for ptq in ("plain", "tuned"):
        folder: Path = planted.artifacts / f"onnx-int8-{ptq}"
        verdicts[ptq] = verify(folder, attack="pgd10", tolerance=0.05, clean_tolerance=0.05)
    assert verdicts["plain"]["verdict"] == "lost"
    assert verdicts["tuned"]["verdict"] == "survived"
    plain, tuned = (verdicts[ptq]["artifacts"][0] for ptq in ("plain", "tuned"))
    assert plain["agreement"] < 0.8
    assert tuned["agreement"] > 0.97
    chosen = artifact.load(planted.artifacts / "onnx-int8-tuned").record["calibration"]
    assert chosen["equalize"]
    for one in chosen["candidates"]:  # nothing else would have mended it
        assert one["equalize"] or one["agreement"]["clean"] < 0.8
