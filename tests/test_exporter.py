"""Export on a run folder with a small trained student: what is written, what is refused, and what is left behind."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import numpy
import onnxruntime
import pytest
import torch
from commandline import TINY
from onnx import load
from torch import nn

import edgekit
from edgekit import artifact, data, exporter, judge, machine, models, quantize, runs, twin
from edgekit.classifier import Wrapped
from edgekit.errors import EdgekitError
from edgekit.exporter import export
from edgekit.files import digest, sha256
from edgekit.formats import FORMATS, onnx, torchscript
from edgekit.inspector import inspect
from edgekit.quantize import start
from edgekit.recipe import read

ALL = ["onnx-fp32", "torchscript-fp32", "onnx-int8"]


def small(classes: int, channels: int) -> nn.Module:
    """Two convolutions and a dense layer: exported in a second."""
    return nn.Sequential(
        *(nn.Conv2d(channels, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6()),
        *(nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, classes)),
    )


class Pixels(nn.Module):
    """The first pixels are the logits: nothing here has weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, :10] * 2


def weightless(classes: int, channels: int) -> nn.Module:
    return Pixels()


def swish(classes: int, channels: int) -> nn.Module:
    """An activation without an integer form, between layers that have one."""
    return nn.Sequential(
        *(nn.Conv2d(channels, 8, 3, 2, 1), nn.SiLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes)),
    )


def make(folder: Path, seed: int = 0, factory: str = "small") -> runs.Run:
    """A finished run in `folder`, as distill leaves one."""
    run = runs.Run(folder)
    folder.mkdir(parents=True, exist_ok=True)
    student = f'architecture = "{__name__}:{factory}"'
    run.recipe_file.write_text(TINY.replace('architecture = "mobilenetv2"\nwidth = 0.25', student))
    recipe = read(run.recipe_file)
    dataset = data.load(recipe.data)
    network = models.build(recipe.student, dataset.classes, dataset.input_shape, *dataset.statistics(), seed)
    if weights := list(network.parameters()):
        optimizer = torch.optim.Adam(weights, 0.02)
        for _ in range(30):
            loss = nn.functional.cross_entropy(network(dataset.train.floats()), dataset.train.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    models.save(network, run.student)
    about = {"status": "finished", "seed": seed, "threads": 1, "data": {"sha256": dataset.sha256}}
    run.save_info(about | {"student_sha256": sha256(run.student)})
    return run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with one finished run that nothing was exported from yet: read-only."""
    folder = tmp_path_factory.mktemp("place")
    make(folder / "runs/small-1")
    (folder / "runs/latest").symlink_to("small-1")
    return folder


@pytest.fixture(scope="module")
def exported(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The same after `export --int8`, and the document: read-only."""
    folder = tmp_path_factory.mktemp("exported") / "work"
    shutil.copytree(place, folder, symlinks=True)
    before = Path.cwd()
    os.chdir(folder)
    try:
        return folder, export(int8=True)
    finally:
        os.chdir(before)


@pytest.fixture
def fresh(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> runs.Run:
    shutil.copytree(place, tmp_path / "work", symlinks=True)
    monkeypatch.chdir(tmp_path / "work")
    return runs.Run(Path("runs/small-1"))


@pytest.fixture
def again(exported: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> runs.Run:
    shutil.copytree(exported[0], tmp_path / "work", symlinks=True)
    monkeypatch.chdir(tmp_path / "work")
    return runs.Run(Path("runs/small-1"))


def inside(run: runs.Run) -> dict[str, bytes]:
    """Every file under artifacts/, hidden ones too."""
    root = run.artifacts
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_the_default_files_and_their_records(exported: tuple[Path, dict[str, Any]]):
    folder, document = exported
    schema = json.loads((Path(edgekit.__file__).parent / "schemas/artifact.json").read_text())
    json.dumps(document, allow_nan=False)
    assert [one["name"] for one in document["artifacts"]] == ALL
    assert sorted(path.name for path in (folder / "runs/small-1/artifacts").iterdir()) == sorted(ALL)
    run = runs.Run(folder / "runs/small-1")
    for one in document["artifacts"]:
        record = json.loads((run.artifacts / one["name"] / "artifact.json").read_text())
        jsonschema.validate(record, schema)
        assert one == {"name": one["name"], "written": True, **record}
        assert f"{record['format']}-{record['precision']}" == one["name"]
        names = {path.name for path in (run.artifacts / one["name"]).iterdir()} - {"artifact.json"}
        assert {file["path"] for file in record["files"]} == names
        for file in record["files"]:
            content = (run.artifacts / one["name"] / file["path"]).read_bytes()
            assert (file["bytes"], file["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
        assert record["classes"] == [str(digit) for digit in range(10)]
        assert record["input"]["shape"] == [None, 1, 8, 8]
        assert record["made_from"] == {
            "run": "small-1",
            "seed": 0,
            "student_sha256": hashlib.sha256(run.student.read_bytes()).hexdigest(),
            "recipe_sha256": hashlib.sha256(run.recipe_file.read_bytes()).hexdigest(),
            "data_sha256": run.info()["data"]["sha256"],
        }
    low, full = document["artifacts"][2], document["artifacts"][0]
    assert low["scheme"]["cannot_saturate"] is True
    assert "scheme" not in full
    assert "calibration" not in full
    # Two convolutions, the average, the dense layer, and what moves integers; the normalization stays float.
    assert low["operators"]["int8"] >= 4
    assert low["operators"]["float"] == {"Div": 1, "QuantizeLinear": 1, "Sub": 1}
    assert "operators" not in full
    assert artifact.load(run.artifacts / "onnx-int8").bytes < artifact.load(run.artifacts / "onnx-fp32").bytes


def test_the_comparison_is_with_the_student_on_validation_images(exported: tuple[Path, dict[str, Any]]):
    """Recomputed with plain onnxruntime and NumPy; test images would give another figure."""
    run = runs.Run(exported[0] / "runs/small-1")
    dataset = data.load(read(run.recipe_file).data)
    student = models.load(run.student, factory=f"{__name__}:small")
    for one in exported[1]["artifacts"]:
        if one["format"] != "onnx":
            continue
        session = onnxruntime.InferenceSession(run.artifacts / one["name"] / "model.onnx")
        figures = []
        for split in (dataset.validation, dataset.test):
            expected = student(split.floats()).detach().numpy()
            answered = numpy.asarray(session.run(None, {"images": split.floats().numpy()})[0])
            agreement = float((answered.argmax(1) == expected.argmax(1)).mean())
            figures.append((len(split), agreement, float(numpy.abs(answered - expected).max())))
        images, agreement, difference = figures[0]
        assert one["against_float"]["images"] == images == len(dataset.validation)
        assert one["against_float"]["agreement"] == pytest.approx(agreement, abs=1e-12)
        assert one["against_float"]["max_abs_difference"] == pytest.approx(difference, abs=1e-5)
        if one["precision"] == "int8":
            assert abs(figures[1][2] - difference) > 1e-4


def test_what_runs_on_integers_is_said(exported: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]):
    written = artifact.load(exported[0] / "runs/small-1/artifacts/onnx-int8")
    exporter._tell(written)
    count = written.record["operators"]["int8"]
    said = f"ONNX Runtime runs {count} operators on integers; in float: 1 Div, 1 QuantizeLinear, 1 Sub"
    assert said in " ".join(capsys.readouterr().err.split())


def test_calibration_is_the_split_of_that_name(exported: tuple[Path, dict[str, Any]]):
    dataset = data.load(read(exported[0] / "runs/small-1/recipe.toml").data)
    record = exported[1]["artifacts"][2]["calibration"]
    images = dataset.calibration.floats()
    if record["adversarial"]:  # chosen or not: the record counts what the ranges were made of
        student = models.load(exported[0] / "runs/small-1/student.safetensors", factory=f"{__name__}:small")
        images = torch.cat([images, start.iterates(student, dataset.calibration, 0.05)])
    assert record["images"] == len(images)
    assert record["sha256"] == digest(images.numpy().tobytes())


def test_the_choice_and_its_candidates_are_recorded(exported: tuple[Path, dict[str, Any]]):
    record = exported[1]["artifacts"][2]["calibration"]
    assert record["ptq"] == "tuned"
    settings = [{name: one[name] for name in quantize.Settings().record()} for one in record["candidates"]]
    assert settings == [one.record() for one in quantize.CANDIDATES]
    assert {name: record[name] for name in settings[0]} in settings
    assert record["measured_on"] == len(data.load(read(exported[0] / "runs/small-1/recipe.toml").data).validation)


def test_the_choice_rests_on_validation_images_and_the_last_iterates_of_an_attack_on_the_student(place: Path):
    run = runs.Run(place / "runs/small-1")
    dataset = data.load(read(run.recipe_file).data)
    student = models.load(run.student, factory=f"{__name__}:small")
    evidence = start.evidence(student, dataset, 0.05)
    assert evidence.clean.equal(dataset.validation.floats())
    assert evidence.calibration.equal(dataset.calibration.floats())
    for clean, adversarial, labels in (
        (evidence.clean, evidence.adversarial, dataset.validation.labels),
        (evidence.calibration, evidence.attacked, dataset.calibration.labels),
    ):
        away = (adversarial - clean).abs()
        assert away.max() == pytest.approx(0.05, abs=1e-6)
        assert adversarial.min() >= 0
        assert adversarial.max() <= 1
        # The last iterates: 20 steps take nearly every pixel that is free to move to the ball's border.
        assert (away > 0.049).float().mean() > 0.4
        right = [(student(images).argmax(1) == labels).float().mean() for images in (clean, adversarial)]
        assert right[1] < right[0] - 0.1
    for images, expected in zip((evidence.clean, evidence.adversarial), evidence.expected, strict=True):
        assert expected.equal(student(images).detach())


def test_plain_and_tuned_stand_side_by_side(again: runs.Run, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(EdgekitError, match=r"another artifact has this name\. Use --label to keep both"):
        export(formats="onnx", int8=True, ptq="plain")
    capsys.readouterr()
    plain = export(formats="onnx", int8=True, ptq="plain", label="plain")["artifacts"][1]
    assert "chosen" not in capsys.readouterr().err
    assert plain["name"] == "onnx-int8-plain"
    assert plain["calibration"]["ptq"] == "plain"
    assert quantize.Settings().record().items() <= plain["calibration"].items()
    assert "candidates" not in plain["calibration"]
    assert not export(formats="onnx", int8=True, ptq="plain", label="plain")["artifacts"][1]["written"]
    assert not export(int8=True)["artifacts"][2]["written"]
    before = inside(again)
    export(formats="onnx", int8=True, force=True)
    assert "Of 9 int8 quantizations chosen: " in capsys.readouterr().err
    assert inside(again) == before  # the choice is the same, and so is every byte
    with pytest.raises(EdgekitError, match=r"--ptq: there is no quantization 'plan'\. Did you mean 'plain'"):
        export(int8=True, ptq="plan")


def test_what_stays_float_is_said_layer_by_layer(fresh: runs.Run, capsys: pytest.CaptureFixture[str]):
    make(fresh.folder, factory="swish")
    record = export(formats="onnx", int8=True, ptq="plain")["artifacts"][1]
    said = capsys.readouterr().err
    named = [one for one in record["float_layers"] if one["reason"] != quantize.BEFORE]
    assert sorted(one["operator"] for one in named) == ["Mul", "Sigmoid"]
    for one in named:
        assert f"onnx-int8: {one['layer']} ({one['operator']}) stays float: {one['reason']}" in said
    assert "Sigmoid has no integer form here" in said
    assert said.count("stays float") == 2
    assert record["in_float"] == {"Div": 1, "Mul": 1, "Sigmoid": 1, "Sub": 1}
    assert onnx.describe(fresh.artifacts / "onnx-int8/model.onnx")["operators"]["int8"]["Conv"] == 2


@pytest.mark.parametrize(
    ("instructions", "measured"),
    [
        ("avx2", True),
        ("avx512bw", True),
        ("sse4_1", False),
        ("avx512_vnni", False),
        ("amx_int8", False),
        ("asimd", False),
    ],
)
def test_two_arithmetics_are_said_to_agree_only_where_there_are_two(
    exported: tuple[Path, dict[str, Any]], monkeypatch, capsys, instructions: str, measured: bool
):
    monkeypatch.setattr(exporter.machine, "int8_instructions", lambda: instructions)
    exporter._tell(artifact.load(exported[0] / "runs/small-1/artifacts/onnx-int8"))
    said = capsys.readouterr().err
    assert "no pair of weights can saturate 16 bits" in said
    assert ("both arithmetics gave the same answers" in said) == measured


def test_the_metadata_of_every_file_says_what_artifact_json_says(exported: tuple[Path, dict[str, Any]]):
    folder, document = exported
    seen = 0
    for one in document["artifacts"]:
        for file in one["files"]:
            path = folder / "runs/small-1/artifacts" / one["name"] / file["path"]
            metadata = FORMATS[one["format"]].describe(path)["metadata"]
            assert json.loads(metadata["classes"]) == one["classes"]
            assert json.loads(metadata["input"]) == one["input"]
            assert metadata["outputs"] == one["outputs"]
            assert metadata["student_sha256"] == one["made_from"]["student_sha256"]
            seen += 1
    assert seen == 4


def test_int8_is_int8_and_its_twin_answers_as_it_does(exported: tuple[Path, dict[str, Any]]):
    path = exported[0] / "runs/small-1/artifacts/onnx-int8/model.onnx"
    assert onnx.describe(path)["operators"]["int8"]["Conv"] == 2
    images = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    file = onnx.open(path, threads=1)(images)
    assert file.equal(onnx.open(path, threads=1, precise=True)(images))
    assert file.equal(twin.open(path)(images).detach())


def test_latency_is_of_int8_against_fp32_at_both_batch_sizes(exported: tuple[Path, dict[str, Any]]):
    (latency,) = exported[1]["latency"]
    assert (latency["artifact"], latency["against"], latency["threads"]) == ("onnx-int8", "onnx-fp32", 1)
    assert [one["batch"] for one in latency["batches"]] == [1, 32]
    for one in latency["batches"]:
        assert one["ratio"] == pytest.approx(one["fp32_seconds"] / one["seconds"])


def test_exporting_the_same_again_touches_nothing(again: runs.Run, capsys: pytest.CaptureFixture[str]):
    before = {path: path.stat().st_mtime_ns for path in again.artifacts.rglob("*")}
    for run in (None, "runs/small-1", "runs/latest", again.folder.resolve()):
        document = export(run, int8=True)
        assert [one["written"] for one in document["artifacts"]] == [False, False, False]
        assert "latency" not in document
        assert capsys.readouterr().err.count("already there") == 3
    os.chdir(again.folder)
    assert not any(one["written"] for one in export(".", int8=True)["artifacts"])
    os.chdir("../..")
    assert {path: path.stat().st_mtime_ns for path in again.artifacts.rglob("*")} == before


def test_another_student_needs_a_label_or_force(again: runs.Run):
    before = inside(again)
    make(again.folder, seed=1)
    with pytest.raises(EdgekitError, match=r"another artifact has this name\. Use --label to keep both, or --force"):
        export(int8=True)
    assert inside(again) == before
    labelled = export(formats=["onnx"], label="new.1")
    assert [one["name"] for one in labelled["artifacts"]] == ["onnx-fp32-new.1"]
    assert {name: content for name, content in inside(again).items() if "new.1" not in name} == before
    forced = export(formats=["onnx"], force=True)
    assert forced["artifacts"][0]["written"]
    after = inside(again)
    assert after["onnx-fp32/model.onnx"] == after["onnx-fp32-new.1/model.onnx"] != before["onnx-fp32/model.onnx"]
    assert {name.split("/")[0] for name in after} == {*ALL, "onnx-fp32-new.1"}


def test_force_mends_a_file_that_has_changed(again: runs.Run):
    path = again.artifacts / "onnx-fp32/model.onnx"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(EdgekitError, match=r"has changed since it was exported.*Run: edgekit export --force"):
        export(formats="onnx")
    export(formats="onnx", force=True)
    assert path.read_bytes() == whole


def test_a_foreign_folder_in_the_way_is_kept(fresh: runs.Run):
    (fresh.artifacts / "onnx-fp32").mkdir(parents=True)
    (fresh.artifacts / "onnx-fp32/notes.txt").write_text("mine")
    with pytest.raises(EdgekitError, match="what stands here is no artifact"):
        export(formats="onnx")
    assert inside(fresh) == {"onnx-fp32/notes.txt": b"mine"}


@pytest.mark.parametrize("formats", ["onnx, torchscript", ["onnx", "torchscript", "onnx"]])
def test_formats_by_name(again: runs.Run, formats: Any):
    assert [one["name"] for one in export(formats=formats)["artifacts"]] == ["onnx-fp32", "torchscript-fp32"]


def test_fp16_is_half_the_size_and_takes_and_answers_float32(fresh: runs.Run):
    document = export(fp16=True, ptq="plain")
    assert [one["name"] for one in document["artifacts"]] == ["onnx-fp32", "torchscript-fp32", "onnx-fp16"]
    full, _, half = document["artifacts"]
    weights = [
        sum(tensor.ByteSize() for tensor in load(fresh.artifacts / one["name"] / onnx.FILE).graph.initializer)
        for one in (full, half)
    ]
    assert weights[1] < 0.6 * weights[0]
    assert 0 < half["against_float"]["max_abs_difference"] < 0.05 and half["against_float"]["agreement"] > 0.99
    images = torch.rand(3, *half["input"]["shape"][1:], generator=torch.Generator().manual_seed(0))
    assert onnx.open(fresh.artifacts / "onnx-fp16" / onnx.FILE)(images).dtype == torch.float32
    assert inspect(fresh.artifacts / "onnx-fp16")["precision"] == "fp16"


def test_named_formats_come_in_fp32_and_in_the_precision_asked_for(again: runs.Run):
    assert [one["name"] for one in export(formats="onnx", int8=True)["artifacts"]] == ["onnx-fp32", "onnx-int8"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"formats": "onx"}, "there is no format 'onx'. Did you mean 'onnx'?"),
        ({"formats": []}, "no format is named"),
        ({"formats": ","}, "no format is named"),
        ({"formats": "torchscript", "int8": True}, "torchscript is not written in int8 by this version"),
        ({"formats": "torchscript", "fp16": True}, "torchscript is not written in fp16 by this version"),
        ({"label": "../up"}, "a label is made of letters, digits"),
        ({"label": ""}, "a label is made of letters, digits"),
        ({"run": "runs/none"}, "runs/none: this is not a run folder"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_writes_nothing(
    fresh: runs.Run, options: dict[str, Any], sentence: str
):
    with pytest.raises(EdgekitError) as caught:
        export(**options)
    assert sentence in str(caught.value)
    assert caught.value.exit_code == 2
    assert not fresh.artifacts.exists()


def test_no_run_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EdgekitError, match=r"no finished run here yet\. Run: edgekit distill recipes/mobilenet\.toml"):
        export()


def spoil(run: runs.Run, **changed: Any) -> None:
    kept = {key: value for key, value in (run.info() | changed).items() if value is not None}
    run.save_info(kept)


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (lambda run: spoil(run, status="running"), "the run has not finished"),
        (lambda run: run.student.unlink(), "the run has not finished"),
        (lambda run: run.student.write_bytes(run.student.read_bytes()[:900]), "the student has changed since it was"),
        (lambda run: spoil(run, student_sha256="0" * 64), "the student has changed since it was trained"),
        (lambda run: spoil(run, data={"sha256": "0" * 64}), "the data has changed since the student was trained"),
        (lambda run: spoil(run, data=None), "do not say what the student was trained on"),
        (lambda run: run.recipe_file.unlink(), "do not say what the student was trained on"),
        (lambda run: spoil(run, seed=None), "do not say what the student was trained on"),
    ],
)
def test_a_run_that_cannot_be_trusted_is_refused(fresh: runs.Run, harm: Any, sentence: str):
    harm(fresh)
    with pytest.raises(EdgekitError, match=sentence):
        export()
    assert not fresh.artifacts.exists()


def nothing_written(run: runs.Run, sentence: str, **options: Any) -> None:
    with pytest.raises(EdgekitError, match=sentence):
        export(**options)
    assert list(run.artifacts.iterdir()) == []  # no half-written folder beside, hidden or not


def test_a_file_that_answers_otherwise_is_not_called_written(fresh: runs.Run, monkeypatch: pytest.MonkeyPatch):
    other = models.load(make(Path("runs/other-1"), seed=5).student, factory=f"{__name__}:small")
    write = onnx.write
    with torch.no_grad():
        next(other.body.parameters()).neg_()
    monkeypatch.setattr(onnx, "write", lambda _, folder, metadata, precision: write(other, folder, metadata))
    nothing_written(fresh, r"onnx-fp32: model\.onnx agrees with the student on .* % of", formats="onnx")


def test_the_lite_file_is_compared_too(fresh: runs.Run, monkeypatch: pytest.MonkeyPatch):
    other = models.load(make(Path("runs/other-1"), seed=5).student, factory=f"{__name__}:small")
    write = torchscript.write
    with torch.no_grad():
        next(other.body.parameters()).neg_()

    def swapped(student: models.Network, folder: Path, metadata: dict[str, str], precision: str) -> None:
        write(other, folder, metadata)
        lite = (folder / "model.ptl").read_bytes()
        write(student, folder, metadata)
        (folder / "model.ptl").write_bytes(lite)

    monkeypatch.setattr(torchscript, "write", swapped)
    nothing_written(fresh, r"torchscript-fp32: model\.ptl agrees with the student on", formats="torchscript")


def test_logits_that_are_no_numbers_are_refused(fresh: runs.Run):
    student = models.load(fresh.student, factory=f"{__name__}:small")
    with torch.no_grad():
        list(student.body.children())[-1].bias[0] = torch.nan  # pyright: ignore
    models.save(student, fresh.student)
    spoil(fresh, student_sha256=sha256(fresh.student))
    nothing_written(fresh, "infinite logits", formats="onnx")


def test_weights_that_could_saturate_are_refused(fresh: runs.Run, monkeypatch: pytest.MonkeyPatch):
    from edgekit.quantize import qdq

    careless = qdq.weigh
    monkeypatch.setattr(qdq, "weigh", lambda *given, pairs, rule: careless(*given, pairs=False, rule=rule))
    with pytest.raises(EdgekitError, match=r"onnx-int8: \d+ weight pairs could saturate, the first in "):
        export(int8=True)
    assert sorted(path.name for path in fresh.artifacts.iterdir()) == ["onnx-fp32", "torchscript-fp32"]


def test_both_arithmetics_must_agree_bit_for_bit(fresh: runs.Run, monkeypatch: pytest.MonkeyPatch):
    opened = onnx.open

    def open(path: Path, *, threads: int | None = None, precise: bool = False):
        file = opened(path, threads=threads, precise=precise)
        return Wrapped(lambda images: file(images) + (1e-6 if precise else 0), differentiable=False)

    monkeypatch.setattr(onnx, "open", open)
    with pytest.raises(EdgekitError, match="answers differently under saturating and exact arithmetic"):
        export(int8=True)
    assert not (fresh.artifacts / "onnx-int8").exists()


def test_a_student_with_nothing_to_quantize_gets_no_proof_about_nothing(fresh: runs.Run):
    make(fresh.folder, factory="weightless")
    with pytest.raises(EdgekitError, match="onnx-int8: no layer of this student could be quantized"):
        export(formats="onnx", int8=True)
    assert [path.name for path in fresh.artifacts.iterdir()] == ["onnx-fp32"]


def test_the_threads_of_torch_are_left_as_they_were(fresh: runs.Run, monkeypatch: pytest.MonkeyPatch):
    spoil(fresh, threads=2)
    during = []
    compare = exporter._against
    monkeypatch.setattr(exporter, "_against", lambda *them: during.append(torch.get_num_threads()) or compare(*them))
    before = torch.get_num_threads()
    export(formats="onnx")
    assert (during, torch.get_num_threads()) == ([2], before)


def test_interleaved_takes_turns_and_gives_medians(monkeypatch: pytest.MonkeyPatch):
    clock, order = [0.0], []

    def work(name: str, costs: list[int]):
        def run() -> None:
            order.append(name)
            clock[0] += costs[order.count(name) - 1]

        return run

    monkeypatch.setattr(machine.time, "perf_counter", lambda: clock[0])
    first, second = [90, 90, 1, 2, 30, 4, 5], [70, 70, 10, 50, 20, 40, 30]
    medians = machine.interleaved([work("a", first), work("b", second)], repetitions=5)
    assert medians == [4, 30]  # the two slow starts apart
    assert order == ["a", "b"] * 7


def test_what_export_made_opens_in_its_own_runtime(exported: tuple[Path, dict[str, Any]]):
    run = runs.Run(exported[0] / "runs/small-1")
    student, images = models.load(run.student, factory=f"{__name__}:small"), torch.rand(9, 1, 8, 8)
    for name in ("onnx-fp32", "torchscript-fp32"):
        opened = judge.open(artifact.load(run.artifacts / name), threads=1)
        assert not opened.differentiable
        assert opened(images).allclose(student(images), atol=1e-4)
