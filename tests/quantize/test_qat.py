"""Quantization-aware training: what it goes on from, what it keeps, and what it gives."""

import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import numpy
import onnx
import pytest
import torch
from commandline import TINY
from torch import nn

import edgekit
from edgekit import data, models, train
from edgekit.classifier import predict
from edgekit.data import Dataset
from edgekit.errors import EdgekitError
from edgekit.formats import onnx as format
from edgekit.methods import METHODS
from edgekit.models import Network
from edgekit.quantize import SCHEMES, Quantized, qat, quantize
from edgekit.recipe import Recipe, read
from edgekit.runs import Run

SCHEME = SCHEMES["x86"]
RECIPE = (
    TINY.replace('architecture = "mobilenetv2"\nwidth = 0.25', f'architecture = "{__name__}:small"')
    .replace("strides = [1, 2, 2, 1, 1, 2, 1]", "")
    .replace("epochs = 4\nbatch_size = 64", "epochs = 6\nbatch_size = 32")
)


def small(classes: int, channels: int) -> nn.Module:
    """An epoch of it takes a tenth of a second."""
    stem = nn.Conv2d(channels, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
    body = nn.Conv2d(16, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
    return nn.Sequential(*stem, *body, nn.Flatten(), nn.Linear(16 * 16, classes))


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run "run" of some seconds, its digits and its fp32 graph."""
    folder = tmp_path_factory.mktemp("taught")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEKIT_CACHE", str(folder / "cache"))
        patch.setattr(train, "_threads", lambda *_: 1)
        patch.chdir(folder)
        (folder / "small.toml").write_text(RECIPE)
        edgekit.distill("small.toml", run="run", device="cpu")
        onnx.save(format.lower(student("run")), folder / "float.onnx")
    return folder


@pytest.fixture
def place(taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the working directory."""
    shutil.copytree(taught, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    monkeypatch.setenv("EDGEKIT_CACHE", str(taught / "cache"))
    # torch's exporter takes seconds, and the student stays the same.
    monkeypatch.setattr(format, "lower", lambda _: onnx.load("float.onnx"))
    return tmp_path / "copy"


def student(run: str = "run") -> Network:
    return models.load(Path(run) / "student.safetensors", factory=f"{__name__}:small")


def recipe(*overrides: str) -> Recipe:
    return read("run/recipe.toml", overrides)


def dataset() -> Dataset:
    return data.load(recipe().data)


def learn(folder: str, *overrides: str, **options: Any) -> qat.Learnt:
    found = dataset()
    return qat.learn(
        onnx.load("float.onnx"), student(), recipe(*overrides), found, found.calibration.floats(), SCHEME,
        Run(Path(folder)), student_sha256="0", **options,
    )  # fmt: skip


def logits(model: onnx.ModelProto, folder: str, images: torch.Tensor) -> torch.Tensor:
    Path(folder).mkdir()
    format.write_model(model, Path(folder), {})
    return predict(format.open(Path(folder) / format.FILE, threads=1), images)


def killed(monkeypatch: pytest.MonkeyPatch, work: Any) -> None:
    """Ctrl-C after the first epoch was saved."""
    save = train._save_checkpoint

    def stop(*arguments: Any) -> None:
        save(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "_save_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            work()


@pytest.mark.parametrize("control", [False, True])
def test_killed_and_resumed_it_gives_the_bytes_of_an_undisturbed_one(place, monkeypatch, control: bool):
    whole = learn("whole", "qat.epochs=3", control=control)
    killed(monkeypatch, lambda: learn("killed", "qat.epochs=3", control=control))
    assert [json.loads(line)["epoch"] for line in Path("killed/log.jsonl").read_text().splitlines()] == [1]
    again = learn("killed", "qat.epochs=3", control=control)
    assert again.model.SerializeToString(deterministic=True) == whole.model.SerializeToString(deterministic=True)
    assert again.record == whole.record
    # A finished one is taken up as it is.
    with monkeypatch.context() as patch:
        patch.setattr(train, "fit", None)
        assert learn("whole", "qat.epochs=3", control=control).model == whole.model


def test_only_what_was_begun_is_continued(place, monkeypatch):
    learn("one", "qat.epochs=1")
    for work in (
        lambda **options: learn("one", "qat.epochs=2", **options),
        lambda **options: learn("one", "qat.epochs=1", control=True, **options),
    ):
        with pytest.raises(EdgekitError, match=r"one: this training was begun with other options.*--force"):
            work()
    with monkeypatch.context() as patch:
        patch.setattr(qat, "code_version", lambda: "other")
        with pytest.raises(EdgekitError, match="other code"):
            learn("one", "qat.epochs=1")
    assert learn("one", "qat.epochs=2", restart=True).record["epochs"] == 2
    weights = Path("one/student.safetensors")
    weights.write_bytes(weights.read_bytes()[:-4] + b"1234")
    with pytest.raises(EdgekitError, match=r"one/student\.safetensors: the trained weights have changed"):
        learn("one", "qat.epochs=2")


def test_its_code_has_a_digest_of_its_own(monkeypatch):
    before, read_bytes = qat.code_version.__wrapped__(), Path.read_bytes
    for name, counts in (("quantize/trainable.py", True), ("twin/integers.py", True), ("exporter.py", False)):
        changed = Path(train.__file__).parent / name
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", lambda path, at=changed: read_bytes(path) + b"#" * (path == at))
            assert (qat.code_version.__wrapped__() != before) == counts


def test_the_control_meets_the_same_batches_and_seeds_and_stays_float(place, monkeypatch):
    seen: dict[bool, list[tuple[bytes, tuple[int, ...], list[float]]]] = {False: [], True: []}
    method = METHODS["rslad"]
    for control in (False, True):

        def loss(network: nn.Module, teacher: Any, images: Any, labels: Any, *, seeds: Any, at=control, **options: Any):
            target = teacher(images)
            # The soft labels are the float student's own.
            assert torch.allclose(target, student()(images), atol=1e-4)
            seen[at].append((images.numpy().tobytes(), tuple(seeds.tolist()), [options["robust_weight"]]))
            return method.loss(network, teacher, images, labels, seeds=seeds, **options)

        with monkeypatch.context() as patch:
            patch.setitem(METHODS, "rslad", type(method)(loss, *list(vars(method).values())[1:]))
            made = learn(str(control), "qat.epochs=2", control=control)
        kinds = {node.op_type for node in made.model.graph.node}
        assert ("QuantizeLinear" in kinds) != control
        assert made.record["control"] == control
    assert seen[False] == seen[True]
    assert len(seen[True]) == 2 * (len(dataset().train) // 32)
    assert seen[True][0] != seen[True][len(seen[True]) // 2]  # each epoch draws anew


def test_ranges_follow_the_weights_first_and_then_stand_still(place):
    measured: list[int] = []

    def scales(overrides: list[str]) -> list[float]:
        made = learn("-".join(overrides), "qat.epochs=2", *overrides)
        held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in made.model.graph.initializer}
        assert (held["relu_scale"] == begun["relu_scale"]) == (held["relu_1_scale"] == begun["relu_1_scale"])
        return [float(held["relu_scale"])]

    start = quantize(onnx.load("float.onnx"), dataset().calibration.floats(), SCHEME)
    begun = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in start.model.graph.initializer}
    assert scales(["qat.frozen_after=0"]) == [float(begun["relu_scale"])]
    assert scales(["qat.frozen_after=1"]) != [float(begun["relu_scale"])]
    # By the step alone: ten times in the first half, and never at the very first step.
    network, steps = qat.FakeQuantized(start, student()), 200
    before = qat._measuring(network, torch.empty(0), SCHEME, qat.Settings(), recipe("qat.frozen_after=0.5"))
    network.measure = lambda _: measured.append(step)  # pyright: ignore
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qat, "quantize", lambda *_: None)
        for step in range(steps):
            before(step, steps)
    assert measured == list(range(10, 101, 10))


def coarse(*arguments: Any) -> Quantized:
    """A quantization to weights of -1, 0 and 1: the largest of each channel is 64 before."""
    made = quantize(*arguments)
    integers = {tensor.name for tensor in made.model.graph.initializer if tensor.name.endswith("_quantized")}
    for tensor in made.model.graph.initializer:
        value = onnx.numpy_helper.to_array(tensor)
        if tensor.name in integers:
            tensor.CopyFrom(onnx.numpy_helper.from_array(numpy.rint(value / 64).astype(value.dtype), tensor.name))
        elif tensor.name.replace("_scale", "_quantized") in integers:
            tensor.CopyFrom(onnx.numpy_helper.from_array(64 * value, tensor.name))
    return made


def test_it_mends_a_bad_quantization(place, monkeypatch):
    """Agreement with the float student, the source of the soft labels, rises."""
    monkeypatch.setattr(qat, "quantize", coarse)
    found = dataset()
    images = found.test.floats()[:500]
    begun = coarse(onnx.load("float.onnx"), found.calibration.floats(), SCHEME).model
    expected = predict(student(), images).argmax(1)
    plain = (logits(begun, "plain", images).argmax(1) == expected).float().mean()
    made = learn("trained", "qat.epochs=6", "qat.learning_rate=0.03").model
    better = (logits(made, "better", images).argmax(1) == expected).float().mean()
    assert {
        int(abs(onnx.numpy_helper.to_array(tensor)).max())
        for tensor in made.graph.initializer
        if tensor.name.endswith("weight_quantized")
    } == {1}
    assert plain < 0.9
    assert better > plain + 0.03


@pytest.mark.parametrize(("control", "said"), [(False, "training diverged"), (True, "wild: the loss is (nan|inf)")])
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_a_training_that_diverges_is_one_sentence(place, control: bool, said: str):
    with pytest.raises(EdgekitError, match=rf"{said}.*Lower qat\.learning_rate") as caught:
        learn("wild", "qat.learning_rate=1e30", control=control)
    assert caught.value.exit_code == 2


def test_soft_labels_of_the_teacher(place):
    with pytest.raises(EdgekitError, match="the recipe of this run names no teacher"):
        learn("none", "qat.soft_labels=teacher")
    shutil.copy("run/student.safetensors", "teacher.safetensors")
    named = ["teacher.weights=teacher.safetensors", f"teacher.factory={__name__}:small"]
    learn("teacher", "qat.soft_labels=teacher", "qat.epochs=1", *named)
    assert Run(Path("teacher")).info()["teacher"]["file"] == "teacher.safetensors"
    learn("student", "qat.epochs=1", *named)
    assert Run(Path("student")).info()["teacher"] == {"file": "student.safetensors", "sha256": "0"}


def export(**options: Any) -> dict[str, Any]:
    return edgekit.export("run", formats="onnx", **{"int8": True, "qat": True, "overrides": "qat.epochs=2"} | options)


def test_export_keeps_the_trained_file_and_its_control_side_by_side(place, monkeypatch, capsys):
    killed(monkeypatch, lambda: export(qat_control=True))
    expected = "Continue with: edgekit export run --int8 --qat --qat-control --set qat.epochs=2 --format onnx"
    assert expected in capsys.readouterr().err
    edgekit.export("run", formats="onnx", int8=True)
    found = {one["name"]: one for one in export(qat_control=True)["artifacts"]}
    assert list(found) == ["onnx-fp32", "onnx-int8-qat", "onnx-fp32-qat.control"]
    assert [one["written"] for one in found.values()] == [False, True, True]
    trained, control = found["onnx-int8-qat"], found["onnx-fp32-qat.control"]
    assert trained["scheme"]["cannot_saturate"]
    assert "scheme" not in control
    assert trained["qat"] | {"control": True, "validation": {}} == control["qat"] | {"validation": {}}
    wanted = {"epochs": 2, "learning_rate": 0.003, "soft_labels": "student", "batch_size": 32, "control": False}
    assert wanted.items() <= trained["qat"].items()
    said = capsys.readouterr().err
    assert "onnx-int8-qat: trained further, best after epoch" in said
    schema = json.loads((Path(edgekit.__file__).parent / "schemas/artifact.json").read_text())
    for name in found:
        jsonschema.validate(json.loads(Path(f"run/artifacts/{name}/artifact.json").read_text()), schema)
    # Neither is the plain file, nor the student.
    files = [Path(f"run/artifacts/{name}/model.onnx").read_bytes() for name in ("onnx-int8", "onnx-int8-qat")]
    assert files[0] != files[1]
    assert control["against_float"]["max_abs_difference"] > 1e-3
    assert [one["written"] for one in export(qat_control=True)["artifacts"]] == [False] * 3
    with pytest.raises(EdgekitError, match="another artifact has this name"):
        export(overrides="qat.epochs=1")
    again = export(overrides="qat.epochs=1", label="short", force=True)
    assert [one["name"] for one in again["artifacts"]] == ["onnx-fp32-short", "onnx-int8-short"]
    assert again["artifacts"][1]["qat"]["epochs"] == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"int8": False}, "--qat: what it trains is an int8 file. Add --int8"),
        ({"qat": False, "overrides": (), "qat_control": True}, "--qat-control: .*Add --qat"),
        ({"qat": False}, "--set qat.epochs=2: .*Add --qat"),
        ({"overrides": "train.epochs=2"}, "--set train.epochs=2: .*only keys of the table"),
        ({"overrides": "qat.epoch=2"}, "has no key 'epoch'. Did you mean 'epochs'"),
        ({"overrides": "qat.frozen_after=2"}, "qat.frozen_after=2: .*less than or equal to 1"),
    ],
)
def test_options_that_cannot_be_are_one_sentence(place, options: dict[str, Any], said: str):
    with pytest.raises(EdgekitError, match=said):
        export(**options)
    assert not Path("run/qat").exists()
