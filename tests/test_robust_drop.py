"""`export --int8 --sensitivity` and `--robust-drop` on students with planted layers."""

import json
import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import numpy
import onnxruntime
import planted
import pytest
import torch
from planted import DENSE, SECOND
from torch.nn import functional
from typer.testing import CliRunner

import edgekit
from edgekit import artifact, data, models, quantize, runs, statistics, twin
from edgekit.assignment import attackable
from edgekit.attacks import parse
from edgekit.attacks.campaign import confront
from edgekit.classifier import Wrapped
from edgekit.cli import app
from edgekit.errors import EdgekitError
from edgekit.exporter import export
from edgekit.files import sha256
from edgekit.formats import onnx
from edgekit.quantize import SCHEMES, Settings, ladder, sensitivity
from edgekit.quantize.ladder import Kept, Material, Rung
from edgekit.recipe import read

EPSILON = 0.05


@dataclass
class Made:
    """One run, its data and what int8 files of it are made of; read-only."""

    run: runs.Run
    dataset: data.Dataset
    student: models.Network
    material: Material
    full: Path


def prepared(folder: Path, *layers: str) -> Made:
    run = planted.make(folder / "runs/small-1", *layers)
    dataset = data.load(read(run.recipe_file).data)
    student = models.load(run.student, factory=planted.FACTORY)
    model = onnx.lower(student)
    onnx.write_model(model, folder, {})
    about = (model, dataset.calibration.floats(), SCHEMES["x86"], Settings(), attackable(student), dataset.validation)
    return Made(run, dataset, student, Material(*about, EPSILON, Kept(folder / "kept.json")), folder / onnx.FILE)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Its second convolution cannot bear eight bits."""
    return prepared(tmp_path_factory.mktemp("one"), SECOND)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Two of its three layers with weights cannot, and at most one of three is left in float."""
    return prepared(tmp_path_factory.mktemp("two"), SECOND, DENSE)


def afresh(made: Made, folder: Path) -> Material:
    """The same with nothing measured yet."""
    return replace(made.material, kept=Kept(folder / "kept.json"))


@pytest.fixture
def place(one: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> runs.Run:
    return there(one, tmp_path, monkeypatch)


def there(made: Made, folder: Path, monkeypatch: pytest.MonkeyPatch) -> runs.Run:
    shutil.copytree(made.run.folder, folder / "work/runs/small-1")
    (folder / "work/runs/latest").symlink_to("small-1")
    monkeypatch.chdir(folder / "work")
    return runs.Run(Path("runs/small-1"))


def test_the_planted_layer_comes_first_and_is_all_that_is_left_in_float(one: Made, tmp_path: Path):
    found = ladder.search(afresh(one, tmp_path), 0.03, one.full, {})
    assert one.material.sensitivity.order[0] == SECOND
    assert [(made.name, made.in_float, made.held) for made in found.tries] == [
        ("post-training", (), False),
        ("1 layer in float", (SECOND,), True),
    ]
    assert found.tries[0].change.high < -0.3
    kept = found.record()
    assert (kept["held"], kept["kept"], kept["allowed"]) == (True, "1 layer in float", 0.03)
    names = {tensor.name for tensor in found.made.model.graph.initializer}
    assert f"{SECOND}.weight" in names and f"{SECOND}.weight_quantized" not in names
    assert {"body.0.weight_quantized", f"{DENSE}.weight_quantized"} <= names


def own_pgd(student: models.Network, images: torch.Tensor, labels: torch.Tensor, start: torch.Tensor, steps: int):
    """All iterates of PGD, written again: (steps + 1, N, C, H, W)."""
    shown = [start]
    for _ in range(steps):
        x = shown[-1].clone().requires_grad_()
        functional.cross_entropy(student(x), labels, reduction="sum").backward()
        assert x.grad is not None
        x = x.detach() + EPSILON / 4 * x.grad.sign()
        shown.append(torch.minimum(torch.maximum(x, images - EPSILON), images + EPSILON).clamp(0, 1))
    return torch.stack(shown)


def test_costs_are_those_of_a_file_with_that_layer_alone_in_int8(one: Made, tmp_path: Path):
    """Recomputed with plain ONNX Runtime and NumPy, and with another PGD from the same starts."""
    measured, trial = one.material.sensitivity, sensitivity.trial(one.dataset.validation, EPSILON)
    assert trial.index.equal(one.dataset.validation.index)  # 162 images: all of them are drawn
    images, labels = trial.images, trial.labels
    recorded = torch.stack(sensitivity.record(one.material.student, trial, 10))
    assert (recorded[0] - images).abs().max() <= EPSILON + 1e-6
    iterates = own_pgd(one.student, images, labels, recorded[0], 10)
    assert (iterates - recorded).abs().gt(1e-6).double().mean() < 1e-3  # a gradient near 0 may turn its sign

    def answers(ask: Any) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Logits on the clean images, and (11, N, K) on the iterates."""
        return ask(images), numpy.stack([ask(each) for each in iterates])

    with torch.no_grad():
        clean, attacked = answers(lambda x: one.student(x).numpy())
    truth = labels.numpy()
    right = clean.argmax(1) == truth
    robust = right & (attacked.argmax(2) == truth).all(0)
    assert measured.robust_accuracy.value == pytest.approx(robust.mean(), abs=0.007)  # one image
    assert len(measured.layers) == 4
    names = quantize.layers(one.material.model)
    for cost in [*measured.layers, measured.together]:
        others = tuple(name for name in names if name != cost.name) if cost is not measured.together else ()
        settings = Settings(in_float=others)
        file = quantize.quantize(one.material.model, one.material.calibration, SCHEMES["x86"], settings).model
        session = onnxruntime.InferenceSession(file.SerializeToString())
        file_clean, file_attacked = answers(lambda x, s=session: numpy.asarray(s.run(None, {"images": x.numpy()})[0]))
        error = (numpy.abs(file_clean - clean).mean() + numpy.abs(file_attacked[-1] - attacked[-1]).mean()) / 2
        held = file_clean.argmax(1) == truth
        withstood = held & (file_attacked.argmax(2) == truth).all(0)
        assert cost.logit_error == pytest.approx(error, rel=0.01)
        assert cost.agreement == pytest.approx((file_clean.argmax(1) == clean.argmax(1)).mean())
        assert cost.clean.only_float == (right & ~held).sum()
        assert cost.clean.only_artifact == (held & ~right).sum()
        assert cost.robust.value == pytest.approx(withstood.mean() - robust.mean(), abs=0.013)
    assert measured.layers[0].robust.high < -0.3  # the planted one
    assert all(abs(cost.robust.value) < 0.05 for cost in measured.layers[1:])
    errors = [cost.logit_error for cost in measured.layers]
    assert errors == sorted(errors, reverse=True)


def test_a_sample_is_robust_that_no_iterate_fools():
    """Sample i falls on iterate i alone, sample 3 on none, and sample 4 was wrong when clean."""
    scores = torch.tensor([[1.0, 0.0]]).repeat(3, 5, 1)
    for number in range(3):
        scores[number, number] = torch.tensor([0.0, 1.0])
    right = torch.tensor([True, True, True, True, False])
    withstood = sensitivity.withstood(Wrapped(lambda x: x, differentiable=False), right, list(scores), torch.zeros(5))
    assert withstood.tolist() == [False, False, False, True, False]


def test_the_drop_is_the_paired_change_that_verify_reports(one: Made, tmp_path: Path):
    """Recomputed from the parts: campaign.confront for the file and for the student, then Tango's interval."""
    material, split = one.material, one.dataset.validation
    settings = Settings(in_float=(SECOND,))
    made = quantize.quantize(material.model, material.calibration, material.scheme, settings)
    onnx.write_model(made.model, tmp_path, {})
    path = tmp_path / onnx.FILE
    robust, float_robust, change = ladder.attacked(material, path)
    sources = {"float": material.student, "twin": twin.open(path)}
    about = (parse("pgd20,pgd20-margin"), split.floats(), split.labels, split.index)
    file = confront(onnx.open(path, threads=1), sources, *about, seed=0, epsilon=EPSILON).robust
    student = confront(material.student, sources, *about, seed=0, epsilon=EPSILON).robust
    only_float, only_file = int((student & ~file).sum()), int((file & ~student).sum())
    assert (change.only_float, change.only_artifact) == (only_float, only_file)
    assert only_float > 0
    assert change.value == (only_file - only_float) / len(split)
    assert (change.low, change.high) == statistics.tango(only_float, only_file, len(split))
    assert robust.value == file.double().mean() and float_robust.value == student.double().mean()


@pytest.mark.parametrize("in_float", [(SECOND,), ("body.0",), (SECOND, DENSE)])
def test_what_stays_float_is_not_turned_into_integers_by_the_runtime(one: Made, tmp_path: Path, in_float: Any):
    """ONNX Runtime quantizes the weights of a convolution between integers as it loads a file, unless kept from it."""
    material, images = one.material, one.dataset.validation.floats()
    made = quantize.quantize(material.model, material.calibration, material.scheme, Settings(in_float=in_float))
    onnx.write_model(made.model, tmp_path, {})
    path = tmp_path / onnx.FILE
    answers = onnx.open(path, threads=1)(images)
    assert (answers - twin.open(path)(images).detach()).abs().max() < 1e-4
    # With no optimization every operator runs as it is written; a sum next to a middle may round to the other side.
    plain = onnx.open(path, threads=1, optimization="none")(images)
    assert (answers - plain).abs().mean() < 0.02


def rungs(made: Made, *in_float: tuple[str, ...]) -> Any:
    def step(material: Material):
        for number, layers in enumerate(in_float):
            about = (material.model, material.calibration, material.scheme, Settings(in_float=layers))
            yield Rung(f"rung {number}", layers, partial(quantize.quantize, *about))

    return step


def test_the_first_that_holds_ends_the_search_and_nothing_dearer_is_measured(two: Made, tmp_path: Path):
    material = afresh(two, tmp_path)
    found = ladder.search(material, 1.0, two.full, {})
    assert [made.name for made in found.tries] == ["post-training"]
    assert not material.measured
    both = (SECOND, DENSE)
    found = ladder.search(material, 0.03, two.full, {}, [rungs(two, (SECOND,), both), rungs(two, ())])
    assert [(made.name, made.held) for made in found.tries] == [("rung 0", False), ("rung 1", True)]
    assert found.kept == 1


def test_where_none_holds_the_smallest_drop_is_kept_wherever_it_was_tried(two: Made, tmp_path: Path):
    both = (SECOND, DENSE)
    found = ladder.search(afresh(two, tmp_path), 0.0, two.full, {}, [rungs(two, (), both, (SECOND,))])
    values = [made.change.value for made in found.tries]
    assert found.kept == 1 == values.index(max(values))
    assert [made.held for made in found.tries] == [False] * 3
    assert f"{DENSE}.weight" in {tensor.name for tensor in found.made.model.graph.initializer}


def test_the_estimate_decides_and_half_a_point_of_a_thousand_is_half_a_point(two: Made):
    change = ladder.Change(-0.005, -0.02, 0.01, 1.0, 5, 0)
    zero = ladder.Accuracy(0.0, 0.0, 0.0)
    tried = ladder.Try("a", (), 1, "0", {}, zero, zero, change)
    assert tried.judged(0.5 / 100).held and not tried.judged(0.0049).held
    assert "-0.5 [-2.0, +1.0] points: at most 0.5 points lost" in tried.judged(0.005).why


def schema(record: dict[str, Any]) -> None:
    jsonschema.validate(record, json.loads((Path(edgekit.__file__).parent / "schemas/artifact.json").read_text()))


def test_export_writes_the_file_that_was_measured_and_records_every_try(place: runs.Run, capsys):
    """Searched, held, recorded; found again without a search; and no other file takes its name."""
    document = export(int8=True, formats="onnx", robust_drop=0.03)
    json.dumps(document, allow_nan=False)
    folder = place.artifacts / "onnx-int8"
    written = artifact.load(folder)
    schema(written.record)
    record = written.record["robust_drop"]
    assert (record["held"], record["split"], record["images"]) == (True, "validation", 162)
    assert [made["name"] for made in record["tries"]] == ["post-training", "1 layer in float"]
    kept = record["tries"][-1]
    assert (kept["sha256"], kept["bytes"]) == (sha256(folder / "model.onnx"), (folder / "model.onnx").stat().st_size)
    assert set(kept["speed"]) == {"1", "32"}
    # What drove the choice stands beside the file, and is no part of what ships.
    assert {file["path"] for file in written.record["files"]} == {"model.onnx"}
    assert json.loads((folder / "sensitivity.json").read_text())["layers"][0]["name"] == SECOND
    assert (folder / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in place.folder.iterdir() if path.name.startswith(".")] == []
    assert "post-training: robust accuracy changes by -" in capsys.readouterr().err
    again = export(int8=True, formats="onnx", robust_drop=0.03)
    assert [one["written"] for one in again["artifacts"]] == [False, False]
    assert again["artifacts"][1]["robust_drop"] == record
    for other in ({"robust_drop": 0.02}, {}):
        with pytest.raises(EdgekitError, match="another artifact has this name"):
            export(int8=True, formats="onnx", **other)


def test_a_missed_budget_keeps_the_best_and_exits_1(two: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run, type = there(two, tmp_path, monkeypatch), CliRunner()
    done = type.invoke(app, ["export", "--int8", "--format", "onnx", "--robust-drop", "0"])
    assert done.exit_code == 1, done.output
    assert "missed, kept" in done.stdout and "post-training" in done.stdout
    assert "No try loses at most 0 points" in done.stderr and "Next: edgekit verify" in done.stderr
    record = artifact.load(run.artifacts / "onnx-int8").record["robust_drop"]
    assert not record["held"]
    assert record["kept"] == max(record["tries"], key=lambda made: made["change"]["value"])["name"]
    # Found again it is as missed as before.
    again = type.invoke(app, ["export", "--int8", "--format", "onnx", "--robust-drop", "0", "--json"])
    assert again.exit_code == 1
    assert json.loads(again.stdout)["artifacts"][1]["robust_drop"] == record


def test_training_is_the_last_try_and_is_recorded_whether_it_came_to_it(two: Made, tmp_path: Path, monkeypatch: Any):
    run = there(two, tmp_path, monkeypatch)

    def ask(**options: Any) -> dict[str, Any]:
        return export(**{"int8": True, "formats": "onnx", "qat": True, **options})

    # Everything may be lost: the first try holds, and nothing is trained.
    ask(robust_drop=1.0, overrides="qat.epochs=1")
    cheap = artifact.load(run.artifacts / "onnx-int8").record
    assert [made["name"] for made in cheap["robust_drop"]["tries"]] == ["post-training"]
    assert cheap["robust_drop"]["training"]["epochs"] == 1 and "qat" not in cheap
    assert not (run.folder / "qat").exists()
    # Nothing may be lost: it trains, and what was trained is in the tries, measured as the others are.
    ask(robust_drop=0.0, overrides="qat.epochs=1", label="all")
    written = artifact.load(run.artifacts / "onnx-int8-all")
    schema(written.record)
    record = written.record["robust_drop"]
    assert [made["name"] for made in record["tries"]] == ["post-training", "1 layer in float", "trained further"]
    best = max(record["tries"], key=lambda made: made["change"]["value"])
    assert (record["kept"], best["sha256"]) == (best["name"], sha256(written.folder / "model.onnx"))
    assert ("qat" in written.record) == (record["kept"] == "trained further")
    assert runs.Run(run.folder / "qat/all").finished
    # The same is found again; with another training, or with none, it is another artifact.
    again = ask(robust_drop=0.0, overrides="qat.epochs=1", label="all")
    assert [one["written"] for one in again["artifacts"]] == [False, False]
    for other in ({"overrides": "qat.epochs=2"}, {"qat": False}):
        with pytest.raises(EdgekitError, match="another artifact has this name"):
            ask(robust_drop=0.0, label="all", **other)


def test_sensitivity_beside_a_file_that_is_there_already(place: runs.Run):
    export(int8=True, formats="onnx")
    folder = place.artifacts / "onnx-int8"
    before = sha256(folder / "model.onnx")
    done = CliRunner().invoke(app, ["export", "--int8", "--format", "onnx", "--sensitivity"])
    assert done.exit_code == 0, done.output
    assert "logit error" in done.stdout and done.stdout.index(SECOND) < done.stdout.index("body.0")
    assert "4 of 4 layers" in done.stderr and "162 validation images" in done.stderr
    measured = (folder / "sensitivity.json").stat().st_mtime_ns
    document = export(int8=True, formats="onnx", sensitivity=True)  # read, not measured again
    assert document["artifacts"][1]["sensitivity"]["layers"][0]["name"] == SECOND
    assert "sensitivity" not in document["artifacts"][0]
    assert (folder / "sensitivity.json").stat().st_mtime_ns == measured
    assert artifact.load(folder).sha256 == before
    export(int8=True, formats="onnx", force=True)  # another file: what was said of the old one goes with it
    assert not (folder / "sensitivity.json").exists()


def test_an_interrupted_search_goes_on_where_it_was(place: runs.Run, monkeypatch: pytest.MonkeyPatch, capsys):
    attacked, files = ladder.attacked, []

    def once(material: Material, path: Path, *more: Any) -> Any:
        if len(files) == 1:
            raise KeyboardInterrupt
        files.append(sha256(path))
        return attacked(material, path, *more)

    monkeypatch.setattr(ladder, "attacked", once)
    with pytest.raises(KeyboardInterrupt):
        export(int8=True, formats="onnx", robust_drop=0.03)
    assert "2 finished measurements are kept" in capsys.readouterr().err  # a try, and the sensitivity
    assert not (place.artifacts / "onnx-int8").exists()
    later = []

    def noted(material: Material, path: Path, *more: Any) -> Any:
        later.append(sha256(path))
        return attacked(material, path, *more)

    monkeypatch.setattr(ladder, "attacked", noted)
    monkeypatch.setattr(sensitivity, "measure", lambda *them: pytest.fail("measured again"))
    record = export(int8=True, formats="onnx", robust_drop=0.03)["artifacts"][1]["robust_drop"]
    assert [made["sha256"] for made in record["tries"]] == [*files, *later]
    assert len(later) == 1 and record["held"]


def test_what_is_kept_serves_no_other_data_epsilon_or_settings(one: Made):
    same = one.material
    others = (
        replace(same, epsilon=0.06),
        replace(same, settings=Settings(in_float=("body.0",))),
        replace(same, calibration=same.calibration[1:]),
        replace(same, validation=same.validation[1:]),
    )
    assert len({same.digest, *(other.digest for other in others)}) == 5
    assert replace(same).digest == same.digest


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"robust_drop": 0.005}, "--robust-drop: is about an int8 file. Add --int8"),
        ({"sensitivity": True}, "--sensitivity: is about an int8 file. Add --int8"),
        ({"int8": True, "robust_drop": -0.1}, "--robust-drop: should be between 0 and 100 points"),
        ({"int8": True, "robust_drop": float("nan")}, "--robust-drop: should be between 0 and 100 points"),
    ],
)
def test_impossible_options_are_refused_before_anything_is_written(place: runs.Run, options: Any, sentence: str):
    with pytest.raises(EdgekitError, match=sentence):
        export(**options)
    assert not place.artifacts.exists()
