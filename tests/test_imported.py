"""A network trained elsewhere: made a run of its own, exported and verified, or refused in one sentence."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from commandline import command
from safetensors.torch import load_file, save_file
from test_exporter import small
from torch import Tensor, nn

from edgekit import artifact, imported, judge, models, runs
from edgekit import data as datasets
from edgekit.errors import EdgekitError
from edgekit.exporter import export
from edgekit.imported import Given
from edgekit.recipe import Data, Student
from edgekit.verifier import verify

FACTORY = "test_exporter:small"
MEAN, STD = 0.3, 0.4
DIGITS = datasets.load(Data(name="digits"))


@pytest.fixture(scope="module")
def elsewhere() -> nn.Module:
    """A network that plain torch has trained on digits that were normalized outside of it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = small(10, 1)
    images, labels = (DIGITS.train.floats() - MEAN) / STD, DIGITS.train.labels
    optimizer = torch.optim.Adam(network.parameters(), 0.02)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
    return network.eval()


@pytest.fixture(scope="module")
def whole(elsewhere: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory after `export --weights` and `verify`; read-only."""
    folder = tmp_path_factory.mktemp("whole")
    save_file(elsewhere.state_dict(), folder / "my net.safetensors", {"format": "pt"})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("edgekit.exporter._compare_latency", lambda *them: {})
        export(**asked("my net.safetensors"), formats="onnx", int8=True, ptq="plain")
        verify(attack="fgsm", samples=60)
        yield folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def asked(name: str) -> dict[str, str]:
    return {"weights": name, "model": FACTORY, "data": "digits", "mean": str(MEAN), "std": str(STD)}


def given(name: str, **more: object) -> Given:
    about = {"model": FACTORY, "data": "digits", "mean": str(MEAN), "std": str(STD)} | more
    return Given(Path(name), **about)  # pyright: ignore


def test_the_files_answer_as_the_network_did_and_verify_judges_them(whole: Path, elsewhere: nn.Module):
    run = runs.find("runs/my-net-1")
    assert runs.latest() == run and run.info()["status"] == "imported"
    images, labels = DIGITS.validation.floats(), DIGITS.validation.labels
    with torch.no_grad():
        expected = elsewhere((images - MEAN) / STD)
    accuracy = (expected.argmax(1) == labels).double().mean().item()
    assert run.info()["metrics"]["clean_accuracy"] == pytest.approx(accuracy) and accuracy > 0.8
    for name, most in {"onnx-fp32": 1e-3, "onnx-int8": 2.0}.items():
        file = artifact.load(run.artifacts / name)
        assert (judge.open(file, isolated=False)(images) - expected).abs().max() < most
        assert file.record["made_from"]["student_sha256"] == run.info()["student_sha256"]
    document = json.loads((run.verdicts / "1/verdict.json").read_text())
    assert {one["name"] for one in document["artifacts"]} == {"onnx-fp32", "onnx-int8"}
    assert document["float"]["clean_accuracy"]["value"] > 0.8
    assert all(one["change"]["robust"] for one in document["artifacts"])


def test_the_same_again_is_the_same_run_and_other_data_another(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shutil.copytree(whole, tmp_path / "work", symlinks=True)
    monkeypatch.chdir(tmp_path / "work")
    document = export(**asked("my net.safetensors"), formats="onnx", int8=True, ptq="plain")
    assert document["run"] == "runs/my-net-1" and not any(one["written"] for one in document["artifacts"])
    other = imported.bring(given("my net.safetensors", overrides=("inner.epsilon=4/255",)))
    assert other.folder == Path("runs/my-net-2") == runs.latest().folder
    # The first is found again behind the second, and what is damaged is not taken for it.
    assert imported.bring(given("my net.safetensors")).folder == Path("runs/my-net-1")
    with pytest.raises(EdgekitError, match="has changed since it was trained"):
        Path("runs/my-net-1/student.safetensors").write_bytes(b"")
        export(**asked("my net.safetensors"), formats="onnx")


def test_options_without_weights_and_a_run_beside_them_are_refused(whole: Path):
    with pytest.raises(EdgekitError, match=r"--model: is about a network trained elsewhere\. Add --weights FILE"):
        export(model="resnet18")
    with pytest.raises(EdgekitError, match=r"--weights a\.pt: the run already has a student\. Leave out runs/my-net-1"):
        export("runs/my-net-1", weights="a.pt")
    with pytest.raises(EdgekitError, match=r"--set student.width=2: the student is trained already|Add --qat"):
        export("runs/my-net-1", overrides="student.width=2")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"epoch": 3, "state_dict": {f"module.{name}": value for name, value in state.items()}},
        lambda state: {"model": {f"_orig_mod.module.{name}": value.double() for name, value in state.items()}},
        lambda state: {name: value for name, value in state.items() if "num_batches" not in name},
    ],
    ids=["plain", "checkpoint", "compiled", "uncounted"],
)
def test_what_torch_saved_is_read_whatever_is_wrapped_around_it(
    here: Path, elsewhere: nn.Module, wrap: Callable[[dict[str, Tensor]], dict[str, object]]
):
    torch.save(wrap(elsewhere.state_dict()), "net.pt")
    run = imported.bring(given("net.pt"))
    images = DIGITS.test.floats()[:20]
    with torch.no_grad():
        answered = models.load(run.student, factory=FACTORY)(images)
        torch.testing.assert_close(answered, elsewhere((images - MEAN) / STD), rtol=1e-4, atol=1e-4)


def test_a_student_of_edgekit_says_itself_what_it_is(here: Path):
    spec = Student(architecture="mobilenetv2", width=0.25, strides=(1, 2, 2, 1, 1, 2, 1))
    network = models.build(spec, DIGITS.classes, DIGITS.input_shape, [MEAN], [STD])
    models.save(network, Path("ours.safetensors"))
    run = imported.bring(Given(Path("ours.safetensors"), data="digits"))
    assert load_file(run.student).keys() == load_file("ours.safetensors").keys()
    assert models.load(run.student).spec == spec
    for more, sentence in {
        ("model", "resnet18"): "--model resnet18: the file says that it holds the architecture 'mobilenetv2'",
        ("mean", "0.5"): "--mean: the file says itself how its images are normalized. Leave it out",
    }.items():
        with pytest.raises(EdgekitError) as caught:
            imported.bring(Given(Path("ours.safetensors"), **{"data": "digits", more[0]: more[1]}))
        assert str(caught.value).startswith(sentence)
    spec = Student(architecture=FACTORY)
    models.save(models.build(spec, DIGITS.classes, (1, 8, 8), [MEAN], [STD]), Path("code.safetensors"))
    with pytest.raises(EdgekitError, match=rf"asks to import '{FACTORY}', which .*: --model {FACTORY}"):
        imported.bring(Given(Path("code.safetensors"), data="digits"))


class Named(nn.Module):
    """All its names begin as a wrapper's would."""

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.model = small(classes, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def test_names_that_look_like_a_wrappers_stay(here: Path, elsewhere: nn.Module):
    state = {f"model.{name}": value for name, value in elsewhere.state_dict().items()}
    for wrapped in (state, {f"module.{name}": value for name, value in state.items()}):
        save_file(wrapped, "net.safetensors")
        run = imported.bring(given("net.safetensors", model=f"{__name__}:Named"))
        images = DIGITS.test.floats()[:20]
        with torch.no_grad():
            answered = models.load(run.student, factory=f"{__name__}:Named")(images)
            torch.testing.assert_close(answered, elsewhere((images - MEAN) / STD), rtol=1e-4, atol=1e-4)


def spoilt(state: dict[str, Tensor], name: str, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    return {key: change(value).contiguous() if key == name else value for key, value in state.items()}


FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "missing": (
        lambda state: {name: value for name, value in state.items() if not name.startswith("0.")},
        f"lacks 1 of the 14 tensors of {FACTORY}, the first '0.weight'. Say another --model",
    ),
    "unknown": (lambda state: state | {"9.scale": torch.ones(1)}, f"holds what {FACTORY} has not: '9.scale'"),
    "shape": (
        lambda state: spoilt(state, "3.weight", lambda value: value[:16]),
        "'3.weight' is 16 x 16 x 3 x 3, and 32 x 16 x 3 x 3 in",
    ),
    "classes": (
        lambda state: spoilt(state, "8.weight", lambda value: value.repeat(2, 1)),
        "the network answers 20 classes ('8.weight'), the data has 10",
    ),
    "integers": (lambda state: spoilt(state, "8.bias", Tensor.char), "'8.bias' holds int8, no floats"),
    "nan": (
        lambda state: spoilt(state, "1.running_var", lambda value: value * torch.nan),
        "'1.running_var' holds infinite values or no numbers",
    ),
    "empty": (lambda state: {}, "there are no tensors in it"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_weights_that_do_not_fit_are_one_sentence_and_no_run(here: Path, elsewhere: nn.Module, fault: str):
    change, sentence = FAULTS[fault]
    save_file(change(elsewhere.state_dict()), "net.safetensors")
    with pytest.raises(EdgekitError) as caught:
        imported.bring(given("net.safetensors"))
    assert str(caught.value).startswith(f"--weights net.safetensors: {sentence}")
    assert not Path("runs").exists()


def test_what_is_not_said_is_asked_for(here: Path, elsewhere: nn.Module):
    save_file(elsewhere.state_dict(), "net.safetensors")
    Path("names.txt").write_text("\n".join("1023456789"))
    Path("letters.txt").write_text("\n".join("abcdefghij"))
    Path("three.txt").write_text("a\nb\nc")
    for more, sentence in (
        ({"model": None}, "the file does not say which architecture it is of. Say --model: mobilenetv2, resnet18, "),
        ({"model": "resnet19"}, "there is no student architecture 'resnet19'. Did you mean 'resnet18'?"),
        ({"data": None}, "an export needs images: to calibrate, to compare and to attack. Say --data FOLDER"),
        ({"data": "nowhere"}, "nowhere: there is no such data folder"),
        ({"mean": None}, "how its images were normalized in training is not said. Say --mean, in units of [0, 1]"),
        ({"std": None}, "Say --std, in units of [0, 1]; --mean 0 --std 1 where they were not"),
        ({"mean": "127"}, "means and standard deviations are in units of [0, 1]"),
        ({"classes": Path("three.txt")}, "the network knows 3 classes, the data has 10"),
        (
            {"classes": Path("names.txt")},
            "stand in another order than the data's, which are sorted by name: its output",
        ),
        ({"classes": Path("letters.txt")}, "the network's class 'a' is none of the data's"),
        ({"overrides": ("student.widht=1",)}, "--set student.widht=1: [student] has no key 'widht'. Did you mean"),
        ({"size": 2}, "--size 2: [data]: 'size' should be greater than or equal to 4"),
    ):
        with pytest.raises(EdgekitError) as caught:
            imported.bring(given("net.safetensors", **more))
        assert sentence in str(caught.value) and "\n" not in str(caught.value)
    Path("names.txt").write_text("\n".join("0123456789"))
    assert imported.bring(given("net.safetensors", classes=Path("names.txt"))).finished
    with pytest.raises(EdgekitError, match="the network takes images of 1 x 8 x 8, the data has 3 x 16 x 16"):
        wrong_size()


def wrong_size() -> None:
    """A student of digits, on photos of another size."""
    from PIL import Image

    for number in range(10):
        Path(f"photos/{number}").mkdir(parents=True)
        for shade in range(8):
            Image.new("RGB", (16, 16), (shade * 30, number * 20, 0)).save(f"photos/{number}/{shade}.png")
    spec = Student(architecture="mobilenetv2", width=0.25)
    models.save(models.build(spec, DIGITS.classes, (1, 8, 8), [MEAN], [STD]), Path("ours.safetensors"))
    imported.bring(Given(Path("ours.safetensors"), data="photos"))


def test_no_file_that_is_none_of_weights_ends_in_more_than_a_sentence(here: Path, elsewhere: nn.Module):
    torch.save(elsewhere.state_dict(), "good.pt")
    good = Path("good.pt").read_bytes()
    torch.save(elsewhere, "module.pt")  # the whole object: reading it would run code
    torch.save([1, 2], "list.pt")
    torch.jit.script(nn.ReLU()).save("script.pt")
    save_file(elsewhere.state_dict(), "good.safetensors")
    half = Path("good.safetensors").read_bytes()[:900]
    for name, content in {
        "cut.pt": good[: len(good) // 2],
        "empty.pt": b"",
        "random.pt": bytes(range(256)) * 4,
        "text.pth": b"hello",
        "wrong.pt": Path("good.safetensors").read_bytes(),
        "cut.safetensors": half,
        "empty.safetensors": b"",
        "wrong.safetensors": good,
        "net.onnx": good,
    }.items():
        Path(name).write_bytes(content)
    for path in sorted(Path().glob("*")):
        if path.name in ("good.pt", "good.safetensors"):
            continue
        with pytest.raises(EdgekitError) as caught:
            imported.bring(given(path.name))
        assert str(caught.value).startswith(f"--weights {path.name}: ") and "\n" not in str(caught.value)
    for place in range(0, len(good), 97):  # a flipped byte is read or refused, whichever
        Path("flipped.pt").write_bytes(good[:place] + bytes([good[place] ^ 255]) + good[place + 1 :])
        try:
            imported._read(Path("flipped.pt"))
        except EdgekitError as error:
            assert "\n" not in str(error)


def test_the_command_says_what_is_missing(here: Path):
    done = command("export", "--weights", "there.safetensors", "--data", "digits", cwd=here)
    assert done.returncode == 2 and done.stderr == "edgekit: --weights there.safetensors: there is no such file\n"
