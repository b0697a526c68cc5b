"""TorchScript from elsewhere: refused unless trusted, then judged in a child and attacked through itself."""

import json
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import command
from test_foreign import desk, file, weights  # noqa: F401 (desk is a fixture)
from torch import Tensor, nn

from edgekit import script
from edgekit.errors import EdgekitError
from edgekit.inspector import inspect

WORDS = ("--data", "photos", "--attack", "pgd5,nes20", "--epsilon", "2/255")


class Network(nn.Module):
    """The network of the ONNX files in test_foreign.py; `form` says what it answers, and to what."""

    def __init__(self, form: str = "scores") -> None:
        super().__init__()
        for name, value in weights().items():
            self.register_buffer(name, torch.from_numpy(value))
        self.form = form

    def forward(self, images: Tensor) -> Any:
        if self.form == "nhwc":
            images = images.permute(0, 3, 1, 2)
        features = nn.functional.conv2d(images, self.kernel, stride=2, padding=1).relu().mean((2, 3))  # pyright: ignore
        scores = features @ self.matrix.T + self.bias  # pyright: ignore
        if self.form == "softmax":
            return scores.mul(5000).softmax(1)
        if self.form == "two":
            return scores, features
        if self.form == "rounded":
            return torch.ops.aten.int_repr(torch.quantize_per_tensor(scores, 0.001, 0, torch.qint32)) * 0.001
        if self.form == "one":
            return scores[:, :1]
        return scores[:2] if self.form == "few" else scores


def save(path: Path, form: str = "scores", *, trace: bool = True) -> Path:
    module: Any = Network(form).eval()
    shape = (4, 8, 8, 3) if form == "nhwc" else (4, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(module, torch.rand(shape)) if trace else torch.jit.script(module), path)
    return path


def verify(desk: Path, name: str, *words: Any) -> tuple[int, dict[str, Any], str]:  # noqa: F811
    done = command("verify", name, "--json", *words, cwd=desk)
    return done.returncode, json.loads(done.stdout) if done.stdout else {}, done.stderr


def test_untrusted_it_is_refused_and_trusted_it_is_attacked_as_the_same_network_in_onnx(desk) -> None:  # noqa: F811
    save(desk / "net.pt")
    code, verdict, said = verify(desk, "net.pt", *WORDS)
    assert (code, verdict, said.count("\n")) == (2, {}, 1)
    assert "net.pt: TorchScript is code" in said and "--trust-file" in said
    code, verdict, _ = verify(desk, "net.pt", *WORDS, "--trust-file")
    (one,) = verdict["artifacts"]
    assert (code, one["format"], one["code_ran"], one["twin"]["agreement"]) == (0, "torchscript", True, 1)
    assert "the file's ran here (--trust-file)" in one["why"]
    assert "ran here" in (desk / verdict["report"]).read_text()
    assert set(one["attacks"][0]["sources"]) == {"file"}
    (other,) = verify(desk, "net.onnx", *WORDS)[1]["artifacts"]
    assert "code_ran" not in other
    for figure in ("clean_accuracy", "robust_accuracy"):
        assert one[figure] == other[figure]
    assert one["attacks"][0]["robust_accuracy"] < one["clean_accuracy"]["value"]


def test_through_a_saturated_softmax_the_attack_still_sees(desk) -> None:  # noqa: F811
    words = ("--data", "photos", "--attack", "pgd5-margin", "--epsilon", "2/255")  # the margin's sign knows no scale
    (one,) = verify(desk, str(save(desk / "soft.pt", "softmax")), *words, "--trust-file")[1]["artifacts"]
    save(desk / "net.pt")
    (plain,) = verify(desk, "net.pt", *words, "--trust-file")[1]["artifacts"]
    assert one["attacks"][0]["robust_accuracy"] == plain["attacks"][0]["robust_accuracy"]
    assert {check["name"]: check["passed"] for check in one["checks"]}["gradients_reach_the_input"]


def test_where_no_gradients_pass_its_scores_are_followed_or_a_source(desk) -> None:  # noqa: F811
    save(desk / "net.pt", "rounded")
    code, verdict, said = verify(desk, "net.pt", *WORDS, "--trust-file")
    (one,) = verdict["artifacts"]
    assert ("twin" in one, [attack["name"] for attack in one["attacks"]]) == (False, ["nes20"])
    assert code in (0, 3)
    assert "no gradients pass through the file itself" in one["why"] and "its scores alone" in one["why"]
    assert "--source" in said
    (desk / "net.onnx").rename(desk / "other.onnx")
    (one,) = verify(desk, "net.pt", *WORDS, "--trust-file", "--source", "other.onnx")[1]["artifacts"]
    assert set(one["attacks"][0]["sources"]) == {"other"}
    assert "no gradients pass through the file itself" in one["why"] and "its scores alone" not in one["why"]


@pytest.mark.parametrize(
    ("form", "words"),
    [("nhwc", ("--layout", "nhwc")), ("two", ("--output", "0")), ("scores", ("--std", "0.5", "--channels", "bgr"))],
)
def test_it_is_fed_and_read_as_it_is_said(desk, form, words) -> None:  # noqa: F811
    save(desk / "net.pt", form)
    code, verdict, said = verify(desk, "net.pt", "--data", "photos", "--attack", "fgsm", "--trust-file", *words)
    assert code in (0, 3), said
    right = verdict["artifacts"][0]["clean_accuracy"]["value"]
    assert right < 48 / 60 if form == "scores" else right == 48 / 60  # colours the wrong way round are answered wrongly


def test_what_it_cannot_be_is_one_sentence(desk) -> None:  # noqa: F811
    for form in ("two", "one", "few"):
        save(desk / f"{form}.pt", form)
    (desk / "none.pt").write_bytes(b"PK\x03\x04 no archive")
    torch.save({"a": torch.zeros(3)}, desk / "pickle.pt")
    save(desk / "net.pt")
    (desk / "names").write_text("cat\ndog\n")
    (desk / "more").mkdir()
    for number in range(4):
        (desk / "photos" / "cat").rename(desk / "more" / str(number)) if number == 0 else None
        (desk / "more" / str(number)).mkdir(exist_ok=True)
    for name, words, sentence in (
        ("two.pt", (), "which of its outputs holds the scores is not said (it has '0', '1'). Say --output"),
        ("two.pt", ("--output", "7"), "there is no output '7'"),
        ("one.pt", (), "answers one value"),
        ("few.pt", (), "answers scores of shape (2, 3) to 16 images"),
        ("none.pt", (), "not a TorchScript file"),
        ("pickle.pt", (), "a pickle of torch.save, not TorchScript"),
        ("absent.pt", (), "there is no such file"),
        ("net.pt", ("--classes", "names"), "2 class names for its 3 scores"),
        ("net.pt", ("--layout", "chwn"), "there is no layout 'chwn'"),
        ("net.pt", ("--data", "more"), "class folders are more than the file's 3 classes"),
        ("net.pt", ("--data", "none"), "there is no such folder"),
    ):
        code, verdict, said = verify(desk, name, "--data", "photos", "--attack", "fgsm", "--trust-file", *words)
        assert (code, verdict) == (2, {}), (name, words, said)
        assert sentence in said and "Traceback" not in said, said
    code, _, said = verify(desk, "net.pt", "--trust-file")
    assert (code, "Say --data FOLDER" in said) == (2, True)
    assert not list(desk.glob("edgekit-verdicts/*"))


def test_inspect_says_what_the_archive_says_and_runs_nothing(tmp_path, monkeypatch) -> None:
    save(tmp_path / "net.pt", "softmax")
    monkeypatch.setattr(torch.jit, "load", None)
    said = inspect(tmp_path / "net.pt")
    assert (said["kind"], said["precision"]) == ("torchscript", "fp32")
    assert said["calls in its code"]["_convolution"] == said["calls in its code"]["softmax"] == 1
    assert "nothing was run" in said["runs"]
    save(tmp_path / "int8.pt", "rounded")
    assert inspect(tmp_path / "int8.pt")["precision"] == "int8"


def test_an_archive_that_announces_much_is_not_read(tmp_path) -> None:
    with (
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("bomb/code/__torch__.py", "w") as entry,
    ):
        for _ in range(65):
            entry.write(bytes(2**20))
    with pytest.raises(EdgekitError, match="more than 64 MiB"):
        script.archive(tmp_path / "bomb.pt")
