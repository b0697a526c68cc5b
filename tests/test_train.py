"""Training: the schedule, which runs are continued, and what is refused before a folder is made."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from commandline import TINY
from torch import nn

import edgekit
from edgekit import data, models, runs, train
from edgekit.errors import EdgekitError
from edgekit.recipe import Train, read
from edgekit.train import learning_rate

MOBILE = TINY.replace("epochs = 4", "epochs = 2").replace("samples = 60", "samples = 20")
QUICK = MOBILE.replace('architecture = "mobilenetv2"\nwidth = 0.25', f'architecture = "{__name__}:small"')


def taught(recipe: str, teacher: str) -> str:
    return recipe.replace('name = "sat"', 'name = "rslad"') + f"\n[teacher]\n{teacher}\n"


def small(classes: int, channels: int) -> nn.Module:
    """An epoch of it takes a tenth of a second."""
    stem = nn.Conv2d(channels, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
    return nn.Sequential(*stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))


def test_multistep_and_cosine_schedules():
    steps = Train(learning_rate=0.1, schedule="multistep", milestones=(0.5, 0.75), gamma=0.1)
    assert [learning_rate(steps, at) for at in (0, 0.49, 0.5, 0.8)] == pytest.approx([0.1, 0.1, 0.01, 0.001])
    cosine = Train(learning_rate=0.2, schedule="cosine", warmup=0.2)
    assert learning_rate(cosine, 0.1) == pytest.approx(0.1)
    assert learning_rate(cosine, 0.2) == pytest.approx(0.2)
    assert learning_rate(cosine, 0.6) == pytest.approx(0.1 * (1 + math.cos(math.pi / 2)))
    assert learning_rate(cosine, 1.0) == pytest.approx(0)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a recipe of two short epochs, and a cache of its own."""
    (tmp_path / "quick.toml").write_text(QUICK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(train, "_threads", lambda *_: 1)
    return tmp_path


def stopped(monkeypatch: pytest.MonkeyPatch, recipe: str = "quick.toml", **options: Any) -> runs.Run:
    """A run that Ctrl-C ended after its first epoch was saved."""
    save = train._save_checkpoint

    def stop(*arguments: Any) -> None:
        save(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "_save_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            edgekit.distill(recipe, device="cpu", **options)
    return runs.Run(Path(options.get("run", f"runs/{Path(recipe).stem}-1")))


def untouched(run: runs.Run) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}


def test_only_what_was_begun_is_continued(place: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    run = stopped(monkeypatch, overrides="train.batch_size=128", seed=3)
    assert run.info()["status"] == "interrupted"
    assert (
        "Continue with: edgekit distill runs/quick-1/recipe.toml --run runs/quick-1 --resume" in capsys.readouterr().err
    )
    (place / "other").mkdir()
    (place / "other/quick.toml").write_text(QUICK.replace("epsilon = 0.05", "epsilon = 0.04"))
    before = untouched(run)
    for said, recipe, options in (
        (r"another recipe \(its inner\.epsilon is 0\.05, not 0\.04\)", "other/quick.toml", {"seed": 3}),
        (r"--set train\.epochs=3: .*another 'train\.epochs'", "quick.toml", {"overrides": ["train.epochs=3"]}),
        (r"--set train\.batch_size=64: ", "quick.toml", {"overrides": ["train.batch_size=64"]}),
        (r"--seed 4: the run was begun with seed 3", "quick.toml", {"seed": 4}),
    ):
        with pytest.raises(EdgekitError, match=said) as caught:
            edgekit.distill(recipe, resume=True, **options)
        assert caught.value.exit_code == 2
    with monkeypatch.context() as patch:
        patch.setattr(train, "code_version", lambda: "other")
        with pytest.raises(EdgekitError, match="other training code"):
            edgekit.distill("quick.toml", resume=True)
    assert untouched(run) == before
    # The same, in full or in part, or in another file of the same content under the same name.
    (place / "other/quick.toml").write_text("# The same.\n" + QUICK)
    found = edgekit.distill("other/quick.toml", overrides=["train.batch_size=128"], seed=3, resume=True)
    assert (found["status"], found["run"], found["seed"]) == ("finished", "runs/quick-1", 3)
    assert [json.loads(line)["epoch"] for line in (run.folder / "log.jsonl").read_text().splitlines()] == [1, 2]
    assert edgekit.distill("quick.toml", resume=True) == found
    with pytest.raises(EdgekitError, match=r"another 'train\.epochs'"):  # of a finished one too
        edgekit.distill("quick.toml", overrides=["train.epochs=9"], seed=3, resume=True)
    run.recipe_file.write_text(run.recipe_file.read_text().replace("epochs = 2", "epochs = 3"))
    with pytest.raises(EdgekitError, match=r"recipe\.toml: the run's recipe was changed"):
        edgekit.distill(run.recipe_file, run=run.folder, resume=True)


def test_a_default_run_that_the_printed_command_finishes_is_the_latest(place: Path, monkeypatch: pytest.MonkeyPatch):
    edgekit.distill("quick.toml", overrides="train.epochs=1")
    stopped(monkeypatch, run="runs/named")
    edgekit.distill("runs/named/recipe.toml", run="runs/named", resume=True)
    assert runs.latest().name == "quick-1"  # whoever names a folder keeps the link where it is
    (place / "quick.toml").rename(place / "later.toml")
    run = stopped(monkeypatch, recipe="later.toml")
    assert runs.latest().name == "quick-1"
    edgekit.distill(run.recipe_file, run=run.folder, resume=True)
    assert runs.latest().name == "later-1"


def test_resume_starts_from_the_beginning_where_nothing_is(place: Path, capsys):
    found = edgekit.distill("quick.toml", run="new", resume=True, overrides="train.epochs=1")
    assert "new: there is nothing to continue yet; it starts from the beginning" in capsys.readouterr().err
    assert found["status"] == "finished"
    (place / "photos").mkdir()
    (place / "photos/a.jpg").touch()
    with pytest.raises(EdgekitError, match="photos: this is not a run folder"):
        edgekit.distill("quick.toml", run="photos", resume=True)


@pytest.mark.parametrize("spoil", ["cut", "empty", "text", "list", "part", "network"])
def test_a_damaged_checkpoint_is_one_sentence(place: Path, monkeypatch: pytest.MonkeyPatch, spoil: str):
    state = stopped(monkeypatch).checkpoint
    whole = torch.load(state, weights_only=True)
    if spoil in ("cut", "empty", "text"):
        state.write_bytes({"cut": state.read_bytes()[:5000], "empty": b"", "text": b"no checkpoint"}[spoil])
    else:
        other = {"part": {key: whole[key] for key in ("student", "data")}, "list": [1]}
        torch.save(other.get(spoil, whole | {"student": {"body": torch.zeros(3)}}), state)
    with pytest.raises(EdgekitError, match=r"state\.pt: the checkpoint cannot be read") as caught:
        edgekit.distill("quick.toml", resume=True)
    assert caught.value.exit_code == 2


def test_another_teacher_is_refused_and_the_first_one_goes_on(place: Path, monkeypatch: pytest.MonkeyPatch):
    dataset = data.load(read("quick.toml").data)
    for seed in (0, 1):
        network = models.build(read("quick.toml").student, dataset.classes, (1, 8, 8), [0.5], [0.25], seed)
        models.save(network, place / f"{seed}.safetensors")
    factory = f'weights = "teacher.safetensors"\nfactory = "{__name__}:small"'
    (place / "taught.toml").write_text(taught(QUICK, factory))
    teacher = place / "teacher.safetensors"
    teacher.write_bytes((place / "0.safetensors").read_bytes())
    stopped(monkeypatch, "taught.toml")
    teacher.write_bytes((place / "1.safetensors").read_bytes())
    with pytest.raises(EdgekitError, match="the run was begun with another teacher"):
        edgekit.distill("taught.toml", resume=True)
    teacher.write_bytes((place / "0.safetensors").read_bytes())
    assert edgekit.distill("taught.toml", resume=True)["status"] == "finished"


def test_a_bf16_student_has_a_teacher_that_is_trained_in_fp32_before_it(place: Path, monkeypatch: pytest.MonkeyPatch):
    mine = Accelerator(cpu=True, mixed_precision="no")  # the caller's own stays as it is
    (place / "teacher.toml").write_text(QUICK)
    (place / "taught.toml").write_text(taught(QUICK, 'recipe = "teacher.toml"'))
    stopped(monkeypatch, "taught.toml", overrides="train.precision=bf16")  # in the teacher's training
    assert runs.Run(Path("runs/taught-1")).info()["status"] == "interrupted"
    (kept,) = (place / "cache/teachers").iterdir()
    assert runs.Run(kept).info()["status"] == "interrupted"
    found = edgekit.distill("runs/taught-1/recipe.toml", run="runs/taught-1", resume=True)
    assert found["status"] == runs.Run(kept).info()["status"] == "finished"
    assert found["teacher"]["sha256"] == runs.Run(kept).info()["student_sha256"]
    assert (mine.mixed_precision, mine.num_processes, mine.device.type) == ("no", 1, "cpu")
    assert "ACCELERATE_TORCH_DEVICE" not in os.environ


LONG = 250 * "x"


@pytest.mark.parametrize(
    ("said", "code", "options"),
    [
        (r"taught\.toml: there is no student architecture", 2, {"overrides": "student.architecture=mobilenetv3"}),
        (r"taught\.toml: \[student\] strides needs 7", 2, {"overrides": "student.strides=[1, 2]"}),
        (r"--set student\.width=1e9: \[student\]: 'width' should be less", 2, {"overrides": "student.width=1e9"}),
        (r"--set student\.strides=\[1, true", 2, {"overrides": "student.strides=[1, true, 2, 2, 1, 2, 1]"}),
        (r"bad\.toml: there is no method 'tradse'", 2, {"overrides": "teacher=bad.toml"}),
        (r"wide\.toml: \[student\] depth", 2, {"overrides": "teacher=wide.toml"}),
        (rf"runs/{LONG}/a: no run folder can be made here \(Not a directory\)", 2, {"run": f"runs/{LONG}/a"}),
        (r"no run folder can be made here \(File name too long\)", 2, {"run": 2 * LONG}),
        (r"no run folder can be made here \(File name too long\)", 2, {"run": "/".join(17 * [LONG[:240]])}),
        (r"runs/taught-1: no run folder can be made here \(Not a directory\)", 2, {}),
        (r"--device meta: there is no such device", 2, {"device": "meta"}),
        (r"--device cpuu: there is no such device", 2, {"device": "cpuu"}),
        (r"'fp16' does not work on the device 'cpu'", 4, {"overrides": "train.precision=fp16"}),
    ],
)
def test_what_cannot_be_is_said_at_once(place: Path, said: str, code: int, options: dict[str, Any]):
    """Before the teacher is trained, and nothing is left behind; `runs` is a file here."""
    (place / "runs").touch()
    (place / "teacher.toml").write_text(MOBILE)
    (place / "bad.toml").write_text(MOBILE.replace('"sat"', '"tradse"'))
    (place / "wide.toml").write_text(MOBILE.replace('"mobilenetv2"', '"wideresnet"\ndepth = 11'))
    (place / "taught.toml").write_text(taught(MOBILE, 'recipe = "teacher.toml"'))
    with pytest.raises(EdgekitError, match=said) as caught:
        edgekit.distill("taught.toml", **{"device": "cpu"} | options)
    assert caught.value.exit_code == code
    assert "\n" not in str(caught.value)
    assert {path.name for path in place.iterdir() if path.suffix != ".toml"} == {"runs"}


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_several_processes_are_refused(place: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setenv(name, "2")
    with pytest.raises(EdgekitError, match="trains in one process, and 2 were asked for"):
        edgekit.distill("quick.toml")
    assert not (place / "runs").exists()


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_accelerate_gets_the_device_that_was_asked_for(device: str):
    with train._accelerated(torch.device(device), "fp32") as accelerator:
        assert accelerator.device == torch.device(device)


def test_the_loss_scale_is_part_of_a_checkpoint(tmp_path: Path):
    student = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    scaler, fresh = torch.amp.GradScaler("cpu", init_scale=2.0**9), torch.amp.GradScaler("cpu")
    scaler.scale(student(torch.ones(1, 3)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    run = runs.Run(tmp_path / "run")
    train._save_checkpoint(run, student, optimizer, [], {}, "", scaler)
    state = train._load_checkpoint(run)
    assert state
    train._restore(run, state, student, optimizer, fresh)
    assert fresh.state_dict() == scaler.state_dict()
    assert fresh.get_scale() == 2.0**9


@pytest.mark.parametrize("channels_last", [True, False])
def test_threads_are_measured_in_the_layout_of_the_run(
    place: Path, monkeypatch: pytest.MonkeyPatch, channels_last: bool
):
    monkeypatch.undo()
    (place / "quick.toml").write_text(
        MOBILE.replace('"mobilenetv2"', '"resnet18"').replace("batch_size = 64", "batch_size = 2")
    )
    recipe = read(place / "quick.toml", [f"train.channels_last={str(channels_last).lower()}"])
    dataset = data.load(recipe.data)
    network = models.build(recipe.student, dataset.classes, dataset.input_shape, [0.5], [0.25])
    built, build, keys = [], models.build, []
    monkeypatch.setattr(models, "build", lambda *arguments: built.append(build(*arguments)) or built[-1])
    monkeypatch.setattr(train.machine, "threads", lambda key, work: keys.append((key, work())) or 7)
    assert train._threads(recipe, network, dataset, torch.device("cpu")) == 7
    # A tensor whose rows or channels are single ones is in both layouts.
    weights = [weight for weight in built[0].parameters() if weight.dim() == 4 and min(weight.shape) > 1]
    assert weights
    assert all(weight.is_contiguous() != channels_last for weight in weights)
    assert str(torch.channels_last if channels_last else torch.contiguous_format) in keys[0][0]


@pytest.mark.parametrize(
    "name",
    [
        "train.py",
        "classifier.py",
        "data.py",
        "attacks/pgd.py",
        "attacks/__init__.py",
        "methods/inner.py",
        "models/fold.py",
    ],
)
def test_the_code_version_sees_what_training_runs_through(monkeypatch: pytest.MonkeyPatch, name: str):
    before, read_bytes = train.code_version(), Path.read_bytes
    changed = Path(train.__file__).parent / name
    monkeypatch.setattr(Path, "read_bytes", lambda path: read_bytes(path) + b"#" * (path == changed))
    assert train.code_version.__wrapped__() != before
