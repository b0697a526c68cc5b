"""ONNX files from elsewhere, built operator by operator, held against the same network in torch."""

import json
import multiprocessing
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import onnx
import pytest
import torch
from commandline import command, interruptible
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from torch import Tensor
from torch.nn import functional

from edgekit import archive, foreign, verifier
from edgekit.errors import EdgekitError
from edgekit.foreign import Ported, Said
from edgekit.formats import onnx as runtime

CLASSES = ("cat", "dog", "eel")
SIDE = 8
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def weights() -> dict[str, numpy.ndarray]:
    """A network that names the brightest colour, with enough noise that its gradients are those of no other."""
    draw = numpy.random.default_rng(0)
    kernel, matrix = draw.normal(0, 0.05, (6, 3, 3, 3)), draw.normal(0, 0.05, (3, 6))
    for feature in range(6):
        kernel[feature, feature % 3] += 0.3
        matrix[feature % 3, feature] += 1
    return {
        "kernel": kernel.astype(numpy.float32),
        "matrix": matrix.astype(numpy.float32),
        "bias": draw.normal(0, 0.01, 3).astype(numpy.float32),
    }


def network(images: Tensor) -> Tensor:
    """What every file here computes from what it is given in NCHW, RGB."""
    own = {name: torch.from_numpy(value).to(images) for name, value in weights().items()}
    features = functional.conv2d(images, own["kernel"], stride=2, padding=1).relu().mean((2, 3))
    return features @ own["matrix"].T + own["bias"]


def file(
    path: Path,
    *,
    shape: Sequence[int | str] = ("batch", 3, SIDE, SIDE),
    element: int = TensorProto.FLOAT,
    nhwc: bool = False,
    softmax: bool = False,
    second: Sequence[int | str] | None = None,
    metadata: dict[str, str] | None = None,
    constants: bool = False,
    scores: Sequence[int | str] | None = ("batch", 3),
) -> Path:
    kind = TensorProto.FLOAT16 if element == TensorProto.FLOAT16 else TensorProto.FLOAT
    stored = {
        name: value.astype(numpy.float16 if kind == TensorProto.FLOAT16 else numpy.float32)
        for name, value in weights().items()
    }
    nodes, x = [], "images"
    if element == TensorProto.UINT8:
        nodes += [helper.make_node("Cast", [x], ["float"], to=kind), helper.make_node("Mul", ["float", "level"], ["x"])]
        stored["level"], x = numpy.array(1 / 255, numpy.float32), "x"
    if nhwc:
        nodes.append(helper.make_node("Transpose", [x], ["nchw"], perm=[0, 3, 1, 2]))
        x = "nchw"
    nodes += [
        helper.make_node("Conv", [x, "kernel"], ["conv"], strides=[2, 2], pads=[1, 1, 1, 1], kernel_shape=[3, 3]),
        helper.make_node("Relu", ["conv"], ["relu"]),
        helper.make_node("GlobalAveragePool", ["relu"], ["pool"]),
        helper.make_node("Flatten", ["pool"], ["flat"]),
        helper.make_node("Gemm", ["flat", "matrix", "bias"], ["scores"], transB=1),
    ]
    if softmax:
        nodes.append(helper.make_node("Softmax", ["scores"], ["probabilities"], axis=1))
    if constants:
        given = [helper.make_node("Constant", [], [n], value=numpy_helper.from_array(v)) for n, v in stored.items()]
        nodes, stored = [*given, *nodes], {}
    outputs = [helper.make_tensor_value_info("probabilities" if softmax else "scores", kind, scores)]
    if second is not None:
        outputs.append(helper.make_tensor_value_info("pool" if len(second) == 4 else "flat", kind, second))
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("images", element, shape)],
        outputs,
        [numpy_helper.from_array(value, name) for name, value in stored.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    helper.set_model_props(model, metadata or {})
    onnx.save(model, path)
    return path


def opened(path: Path, said: Said | None = None) -> tuple[Ported, Ported | None]:
    """The file in its runtime, and its twin."""
    model = foreign.read(path)
    port = foreign.port(path, model, said or Said())
    raw = runtime.open(path, threads=1, output=port.output)
    return Ported(port, raw, differentiable=False), foreign.twin(path, port)


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (7, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(0)) / 255


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, None),
        ({"constants": True}, None),
        ({"shape": ("batch", 3, "height", "width")}, None),
        ({"shape": (1, 3, SIDE, SIDE), "scores": (1, 3)}, None),
        ({"shape": (4, 3, SIDE, SIDE), "scores": (4, 3)}, None),
        ({"shape": ("batch", SIDE, SIDE, 3), "nhwc": True}, None),
        ({"shape": ("batch", "h", "w", "c"), "nhwc": True}, Said(layout="nhwc")),
        ({"element": TensorProto.UINT8}, None),
        ({"second": ("batch", 6, 1, 1)}, None),
        ({"second": ("batch", 6)}, Said(output="scores")),
        ({"metadata": {"layout": "NCHW"}, "shape": ("batch", "c", "h", "w")}, None),
    ],
)
def test_however_a_file_is_fed_it_answers_what_its_network_computes(tmp_path, images, options, said) -> None:
    judge, twin = opened(file(tmp_path / "net.onnx", **options), said)
    expected = network(images)
    assert torch.allclose(judge(images), expected, atol=1e-5)
    assert twin is not None
    assert torch.allclose(twin(images), expected, atol=1e-5)
    x, y = images.clone().requires_grad_(), images.clone().requires_grad_()
    twin(x)[:, 1].sum().backward()
    network(y)[:, 1].sum().backward()
    assert x.grad is not None and y.grad is not None
    assert torch.allclose(x.grad, y.grad, atol=1e-5)


@pytest.mark.parametrize(
    ("metadata", "said", "expected"),
    [
        ({}, Said(mean="0.5,0.4,0.3", std="0.2,0.25,0.3"), lambda x: network((x - mean()) / std())),
        ({}, Said(mean="127.5/255", std="0.5"), lambda x: network((x - 0.5) / 0.5)),
        ({}, Said(channels="bgr"), lambda x: network(x.flip(1))),
        (
            {},
            Said(channels="bgr", mean="0.5,0.4,0.3", std="0.2,0.25,0.3"),
            lambda x: network(((x - mean()) / std()).flip(1)),
        ),
        (
            {"mean": "[0.5, 0.4, 0.3]", "std": "[0.2, 0.25, 0.3]", "channels": "BGR"},
            Said(),
            lambda x: network(((x - mean()) / std()).flip(1)),
        ),
        ({"mean": "[0.5, 0.4, 0.3]", "std": "[0.2, 0.25, 0.3]"}, Said(mean="0", std="1"), network),
        ({"mean": "[127.5, 102, 76.5]", "std": "51,63.75,76.5"}, Said(), lambda x: network((x - mean()) / std())),
        ({"mean": "[0.5, 0.4, 0.3]"}, Said(std="0.2,0.25,0.3"), lambda x: network((x - mean()) / std())),
        ({"std": "[0.2, 0.25, 0.3]"}, Said(mean="0.5,0.4,0.3"), lambda x: network((x - mean()) / std())),
    ],
)
def test_normalization_and_order_come_from_the_options_then_from_the_metadata(
    tmp_path, images, metadata: dict[str, str], said: Said, expected: Callable[[Tensor], Tensor]
) -> None:
    judge, twin = opened(file(tmp_path / "net.onnx", metadata=metadata), said)
    assert torch.allclose(judge(images), expected(images), atol=1e-4)
    assert twin is not None
    assert torch.allclose(twin(images), expected(images), atol=1e-4)


def mean() -> Tensor:
    return torch.tensor(MEAN).view(1, 3, 1, 1)


def std() -> Tensor:
    return torch.tensor(STD).view(1, 3, 1, 1)


def test_a_half_precision_file_is_fed_in_half_precision(tmp_path, images) -> None:
    judge, _ = opened(file(tmp_path / "net.onnx", element=TensorProto.FLOAT16))
    assert torch.allclose(judge(images), network(images), atol=0.02)


def test_scores_are_the_logarithms_of_probabilities(tmp_path, images) -> None:
    judge, _ = opened(file(tmp_path / "net.onnx", softmax=True))
    assert judge.port.probabilities
    assert torch.allclose(judge(images), network(images).log_softmax(1), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "said", "sentence"),
    [
        ({"shape": ("batch", "c", "h", "w")}, Said(), "Say --layout nchw or --layout nhwc"),
        ({"shape": ("batch", 3, SIDE, 3)}, Said(), "Say --layout"),
        ({"shape": ("batch", 3, SIDE)}, Said(), "it has not four dimensions"),
        ({}, Said(layout="nhwc"), "with nhwc it has 8 channels"),
        ({}, Said(layout="nchv"), "Did you mean 'nchw'"),
        ({}, Said(channels="gbr"), "--channels"),
        ({}, Said(mean="0.5,0.5"), "one per channel"),
        ({}, Said(mean="123.7,116.3,103.5", std="58,57,57"), "Write 123/255"),
        ({}, Said(std="0"), "above 0"),
        ({}, Said(mean="123.7,116.3,103.5"), r"^--mean 123.7,116.3,103.5: .* Write 123/255"),
        ({"metadata": {"mean": "123.7", "std": "0.5"}}, Said(), r"metadata 'mean' and 'std': .* Say --mean and --std"),
        ({"metadata": {"mean": "0.5"}}, Said(), "has 'mean' and no 'std'. Say --std 1 if there is none"),
        ({"metadata": {"std": "0.5"}}, Said(), "has 'std' and no 'mean'. Say --mean 0 if there is none"),
        ({"metadata": {"mean": "0.5", "std": "0"}}, Said(), "metadata 'std': a standard deviation is above 0"),
        ({"metadata": {"input": '{"normalization": "inside"}'}}, Said(std="0.5"), "normalizes its images itself"),
        ({}, Said(mean="half"), "should be numbers"),
        ({"second": ("batch", 6)}, Said(), "Say --output NAME"),
        ({}, Said(output="score"), "Did you mean 'scores'"),
        ({"metadata": {"classes": '["a", "b"]'}}, Said(), "2 class names for the 3 scores"),
    ],
)
def test_what_is_not_said_is_asked_for_and_what_is_wrong_is_named(tmp_path, options, said, sentence) -> None:
    with pytest.raises(EdgekitError, match=sentence.replace("(", "[(]")) as caught:
        opened(file(tmp_path / "net.onnx", **options), said)
    assert "\n" not in str(caught.value)


def test_weights_beside_the_file_are_read_and_those_elsewhere_are_not(tmp_path, images) -> None:
    model = onnx.load(file(tmp_path / "inside.onnx"))
    beside = tmp_path / "model"
    beside.mkdir()
    onnx.save(model, beside / "net.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    judge, _ = opened(beside / "net.onnx")
    assert torch.allclose(judge(images), network(images), atol=1e-5)
    before = foreign.fingerprint(beside / "net.onnx", ["w.bin"])
    (beside / "w.bin").write_bytes((beside / "w.bin").read_bytes()[:-1] + b"\x00")
    assert foreign.fingerprint(beside / "net.onnx", ["w.bin"]) != before
    (beside / "w.bin").rename(tmp_path / "w.bin")
    with pytest.raises(EdgekitError, match=r"'w\.bin' is missing"):
        foreign.read(beside / "net.onnx")
    (beside / "w.bin").symlink_to(tmp_path / "w.bin")
    with pytest.raises(EdgekitError, match="outside its folder"):
        foreign.read(beside / "net.onnx")
    stray = onnx.load(beside / "net.onnx", load_external_data=False)
    for tensor in stray.graph.initializer:
        next(entry for entry in tensor.external_data if entry.key == "location").value = "../w.bin"
    (beside / "stray.onnx").write_bytes(stray.SerializeToString())
    with pytest.raises(EdgekitError, match="outside its folder"):
        foreign.read(beside / "stray.onnx")


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x07" * 50, b"PK\x03\x04zip"])
def test_what_is_no_model_is_refused(tmp_path, content) -> None:
    (tmp_path / "net.onnx").write_bytes(content)
    with pytest.raises(EdgekitError, match=r"not an ONNX model|an invalid ONNX graph"):
        foreign.read(tmp_path / "net.onnx")


def test_a_graph_whose_nodes_do_not_join_is_refused(tmp_path) -> None:
    model = onnx.load(file(tmp_path / "net.onnx"))
    model.graph.node[0].input[1] = "nowhere"
    (tmp_path / "net.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(EdgekitError, match="an invalid ONNX graph"):
        foreign.read(tmp_path / "net.onnx")


def test_a_torchscript_file_from_elsewhere_is_code_and_is_not_opened(tmp_path) -> None:
    (tmp_path / "net.pt").write_bytes(b"PK")
    with pytest.raises(EdgekitError, match="are code"):
        foreign.read(tmp_path / "net.pt")


@pytest.mark.parametrize(
    ("folders", "names", "expected", "named"),
    [
        (["eel", "cat"], CLASSES, [2, 0], True),
        (["Eel ", "CAT"], CLASSES, [2, 0], True),
        (["cat", "eel"], ["cat", "dog", "eel"], [0, 2], True),
        (["ant", "bee"], CLASSES, [0, 1], False),
        (["cat", "bee"], CLASSES, [0, 1], False),
        (["090", "7"], ["7", "90", "x"], [1, 0], True),
        (["a", "b"], None, [0, 1], False),
        (["0", "7"], ["007", "000", "1" * 5000], [1, 0], True),
        (["sea_lion", "x"], ["x", "Sea lion", "y"], [1, 0], True),
    ],
)
def test_folders_find_their_scores(folders, names, expected, named) -> None:
    assert foreign.matched(folders, names, 3) == (expected, named)


def test_more_folders_than_scores_are_refused() -> None:
    with pytest.raises(EdgekitError, match="4 class folders are more than the file's 3"):
        foreign.matched(list("abcd"), None, 3)


@pytest.mark.parametrize(
    "text", ['["cat", "dog", "eel"]', "{0: 'cat', 1: 'dog', 2: 'eel'}", '{"2": "eel", "0": "cat", "1": "dog"}']
)
def test_class_names_are_read_from_metadata_of_several_forms(tmp_path, text) -> None:
    path = file(tmp_path / "net.onnx", metadata={"names": text})
    assert foreign.port(path, foreign.read(path), Said()).names == CLASSES


def test_class_names_of_the_users_file_come_first(tmp_path) -> None:
    path = file(tmp_path / "net.onnx", metadata={"names": '["x", "y", "z"]'})
    (tmp_path / "names.txt").write_text("cat\ndog\n\neel\n")
    assert foreign.port(path, foreign.read(path), Said(classes=tmp_path / "names.txt")).names == CLASSES


# Through the command line ---------------------------------------------------------------------------------------------


@pytest.fixture
def desk(tmp_path, monkeypatch) -> Path:
    """A working directory with a file, and photos that are labelled as the file answers, one in five otherwise."""
    monkeypatch.chdir(tmp_path)
    file(tmp_path / "net.onnx", metadata={"names": json.dumps(CLASSES)})
    draw = numpy.random.default_rng(1)
    for number in range(60):
        pixels = (255 * draw.random((SIDE, SIDE, 3)) ** draw.uniform(0.3, 3, 3)).astype(numpy.uint8)
        score = network(torch.from_numpy(pixels / 255).float().permute(2, 0, 1)[None])[0]
        label = int(score.argmax()) if number % 5 else int(score.argmin())
        folder = tmp_path / "photos" / CLASSES[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return tmp_path


def verify(desk: Path, *words: Any) -> tuple[int, dict[str, Any], str]:
    done = command("verify", desk / "net.onnx", "--json", *words, cwd=desk)
    return done.returncode, json.loads(done.stdout) if done.stdout else {}, done.stderr


def test_a_file_of_no_run_is_measured_and_its_verdict_is_kept(desk) -> None:
    code, verdict, said = verify(desk, "--data", "photos", "--attack", "pgd5", "--epsilon", "2/255")
    (one,) = verdict["artifacts"]
    assert (code, verdict["verdict"], one["verdict"]) == (0, "measured", "measured")
    assert one["clean_accuracy"]["value"] == 48 / 60
    assert 0 < one["robust_accuracy"]["value"] < 48 / 60
    assert one["twin"]["agreement"] == 1
    assert not {"change", "float_robust_accuracy", "agreement"} & set(one)
    assert "float" not in verdict
    assert "The file takes images RGB, NCHW, 8 x 8, in [0, 1], not normalized; it answers scores" in said
    kept = desk / "edgekit-verdicts" / "1"
    assert json.loads((kept / "verdict.json").read_text()) == verdict
    assert len((kept / "samples.jsonl").read_text().splitlines()) == 60
    again = ("--data", "photos", "--attack", "fgsm", "--epsilon", "2/255", "--seed", "1", "--samples", "30")
    assert verify(desk, *again)[1]["looks"] == 2


def test_a_resume_takes_up_nothing_that_was_made_with_another_input(desk, monkeypatch) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    words: dict[str, Any] = {"data": "photos", "attack": "pgd5", "epsilon": "2/255", "std": "0.5"}
    fresh = verifier.verify("net.onnx", mean="0.1", **words)["artifacts"][0]["robust_accuracy"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(archive, "keep", killed)
        verifier.verify("net.onnx", mean="0.9", **words)
    resumed = verifier.verify("net.onnx", mean="0.1", resume=True, **words)["artifacts"][0]["robust_accuracy"]
    assert resumed == fresh


@pytest.mark.parametrize(("floor", "code", "word"), [(1, 0, "survived"), (99, 1, "lost")])
def test_a_floor_makes_it_a_verdict(desk, floor, code, word) -> None:
    options = ("--data", "photos", "--attack", "fgsm", "--epsilon", "0.001", "--at-least", floor)
    found, verdict, _ = verify(desk, *options)
    assert (found, verdict["verdict"]) == (code, word)


@pytest.mark.parametrize(
    ("name", "called"), [("other", "other"), ("twin", "twin.onnx"), ("scores", "scores.onnx"), ("twin+x", "twin-x")]
)
def test_another_model_lends_its_gradients_and_takes_the_place_of_no_other(desk, name, called) -> None:
    file(desk / f"{name}.onnx")
    document = verifier.verify("net.onnx", data="photos", attack="pgd5", epsilon="2/255", source=desk / f"{name}.onnx")
    assert set(document["artifacts"][0]["attacks"][0]["sources"]) == {"twin", called}


def test_a_file_that_only_guesses_is_not_decided(desk) -> None:
    for number, label in enumerate(CLASSES):  # every folder under another name
        (desk / "photos" / label).rename(desk / "photos" / f"{number}")
    for number in range(3):
        (desk / "photos" / f"{number}").rename(desk / "photos" / CLASSES[(number + 1) % 3])
    code, verdict, _ = verify(desk, "--data", "photos", "--attack", "fgsm", "--at-least", 1)
    assert (code, verdict["verdict"]) == (3, "inconclusive")
    assert "no more than guessing" in verdict["artifacts"][0]["why"]


def test_bad_photos_and_options_are_one_sentence(desk) -> None:
    empty = desk / "empty"
    (empty / "cat").mkdir(parents=True)
    big = desk / "big" / "cat"
    big.mkdir(parents=True)
    Image.new("RGB", (9, 12)).save(big / "a.png")
    for words, sentence in (
        ((), "Say --data FOLDER"),
        (("--data", "nowhere"), "there is no such folder"),
        (("--data", "empty"), "the class has no images"),
        (("--data", "big/cat"), "no class folders"),
        (("--data", "big"), "the image is 12 x 9 pixels, the file takes 8 x 8. Say --resize"),
        (("--data", "photos", "--size", "9"), "the file takes 8 x 8 pixels and nothing else"),
        (("--data", "photos", "--classes", "none.txt"), "--classes none.txt: there is no such file"),
        (("--data", "photos", "--classes", "photos"), "--classes photos: there is no such file"),
        (("--data", "photos", "--save-adversarial", "net.onnx/x.npz"), "net.onnx/x.npz: its folder is not there"),
        (("--data", "photos", "--report", "x" * 300), "File name too long"),
        (("--data", "photos", "--source", "none.onnx"), "none.onnx: there is no such file"),
    ):
        code, verdict, said = verify(desk, "--attack", "fgsm", *words)
        assert (code, verdict) == (2, {}), words
        assert sentence in said
        assert "Traceback" not in said
    assert not list(desk.glob("edgekit-verdicts/*"))


def test_names_that_are_no_utf8_do_no_harm(desk) -> None:
    strange = os.fsdecode(b"\xff")
    (desk / "photos").rename(desk / strange)
    (desk / strange / "cat").rename(desk / strange / f"cat{strange}")
    photo = next((desk / strange / "dog").iterdir())
    photo.rename(photo.with_name(f"{strange}.png"))
    code, verdict, said = verify(desk, "--data", strange, "--attack", "fgsm")
    assert (code, verdict["data"]["name"]) in ((0, r"\xff"), (3, r"\xff")), said
    (desk / "net.onnx").rename(desk / f"net{strange}.onnx")
    done = command("verify", desk / f"net{strange}.onnx", "--data", strange, cwd=desk)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert r"net\xff.onnx: the name is no UTF-8" in done.stderr


def test_photos_of_another_size_are_resized_when_asked(desk) -> None:
    (desk / "big" / "cat").mkdir(parents=True)
    pixels = numpy.full((16, 24, 3), (0, 200, 0), numpy.uint8)
    pixels[:, :4] = pixels[:, 20:] = (255, 0, 0)  # outside of the middle, which alone is to be seen
    Image.fromarray(pixels).save(desk / "big" / "cat" / "a.png")
    code, verdict, _ = verify(desk, "--data", "big", "--resize", "--attack", "fgsm", "--save-adversarial", "a.npz")
    assert (code, verdict["samples"]) == (3, 1)  # one image decides nothing
    with numpy.load(desk / "a.npz") as archive:
        (shown,) = archive["images"].transpose(0, 2, 3, 1) * 255
    assert shown.shape == (SIDE, SIDE, 3)
    assert numpy.abs(shown[:, 2:-2] - (0, 200, 0)).max() <= 1  # next to a crop's edges what lay beyond is felt
    assert shown[..., 1].min() > 150


def test_the_report_goes_where_it_is_asked_for(desk) -> None:
    copies = ("--report", "r.html", "--markdown", "r.md", "--junit", "r.xml")
    _, verdict, _ = verify(desk, "--data", "photos", "--attack", "fgsm", *copies)
    assert verdict["report"] == "edgekit-verdicts/1/report.html"
    page = (desk / "r.html").read_text()
    assert page == (desk / verdict["report"]).read_text()
    assert "edgekit verify" in page and "cat" in page
    assert page.count("<polyline") + page.count("<path") >= 2  # accuracy against epsilon, and against steps
    assert "` net `" in (desk / "r.md").read_text()
    assert "<testsuite" in (desk / "r.xml").read_text()


def test_another_program_can_be_the_judge(desk) -> None:
    words = ("--data", "photos", "--attack", "pgd5", "--epsilon", "2/255")
    _, own, _ = verify(desk, *words)
    program = f"{sys.executable} -m edgekit.judge.child net.onnx"
    _, other, _ = verify(desk, *words, "--judge", program)
    (one,), (two,) = own["artifacts"], other["artifacts"]
    assert one["robust_accuracy"] == two["robust_accuracy"]
    assert two["judged_on"] == f"judge {program}"
    code, _, said = verify(desk, *words, "--judge", "tcp://127.0.0.1:1")
    assert code == 4
    assert "cannot be reached" in said


def test_a_judge_needs_no_runtime_here_that_takes_the_file(desk) -> None:
    words = ("--data", "photos", "--attack", "nes50", "--epsilon", "2/255")
    (own,) = verify(desk, *words)[1]["artifacts"]
    program = f"{sys.executable} -m edgekit.judge.child right.onnx"
    # So that the judge alone knows how many classes there are.
    file(desk / "right.onnx", scores=("batch", "k"), metadata={"names": json.dumps(CLASSES)})
    model = onnx.load(desk / "right.onnx")
    model.graph.node[1].op_type, model.graph.node[1].domain = "DeviceOnly", "a.device"
    model.opset_import.append(helper.make_opsetid("a.device", 1))
    onnx.save(model, desk / "net.onnx")
    code, _, said = verify(desk, *words)
    assert code == 2 and "a.device" in said, said
    code, verdict, said = verify(desk, *words, "--judge", program)
    (one,) = verdict["artifacts"]
    assert one["robust_accuracy"] == own["robust_accuracy"], said
    assert one["judged_on"] == f"judge {program}"


def test_the_probabilities_of_a_judge_become_scores_where_its_file_ends_in_a_softmax(desk) -> None:
    words = ("--data", "photos", "--attack", "nes50,pgd5-margin", "--epsilon", "2/255")
    file(desk / "net.onnx", softmax=True, metadata={"names": json.dumps(CLASSES)})
    (own,) = verify(desk, *words)[1]["artifacts"]
    _, verdict, said = verify(desk, *words, "--judge", f"{sys.executable} -m edgekit.judge.child net.onnx")
    (one,) = verdict["artifacts"]
    assert "the logarithms of the judge's probabilities are its scores" in said
    for name in ("robust_accuracy", "twin"):
        assert one[name] == own[name]
    file(desk / "plain.onnx")
    _, verdict, said = verify(desk, *words, "--judge", f"{sys.executable} -m edgekit.judge.child plain.onnx")
    assert "answers no probabilities: they are taken as scores" in said
    file(desk / "net.onnx", scores=("batch", 4))
    code, _, said = verify(desk, *words, "--judge", f"{sys.executable} -m edgekit.judge.child plain.onnx")
    assert (code, "the judge answers 3 scores, the file 4" in said) == (2, True)


def test_on_the_grid_every_image_is_one_that_a_camera_can_deliver(desk) -> None:
    words = ("--data", "photos", "--attack", "pgd5", "--epsilon", "2.5/255", "--save-adversarial", "a.npz")
    _, verdict, _ = verify(desk, *words, "--grid")
    with numpy.load(desk / "a.npz") as archive:
        moved, clean = archive["net/adversarial"], archive["images"]
    assert numpy.abs(moved * 255 - (moved * 255).round()).max() < 1e-3
    assert numpy.abs(moved - clean).max() <= 2 / 255 + 1e-6
    assert 0 < verdict["artifacts"][0]["robust_accuracy"]["value"] < 48 / 60


def test_the_l2_ball_is_searched_when_asked_for(desk) -> None:
    words = ("--data", "photos", "--attack", "pgd5,nes20", "--norm", "L2", "--epsilon", "0.1", "--save-adversarial")
    code, verdict, _ = verify(desk, *words, "a.npz")
    assert (code, verdict["norm"]) == (0, "L2")
    with numpy.load(desk / "a.npz") as archive:
        lengths = numpy.sqrt(((archive["net/adversarial"] - archive["images"]) ** 2).sum((1, 2, 3)))
    assert 0.09 < lengths.max() <= 0.1 + 1e-5


def test_the_self_test_is_one_more_check(desk) -> None:
    words = ("--data", "photos", "--attack", "pgd20-margin", "--epsilon", "2/255", "--self-test")
    names = {check["name"]: check["passed"] for check in verify(desk, *words)[1]["artifacts"][0]["checks"]}
    assert "planted_example_found" in names
    assert {"epsilon_zero_is_clean", "steps_increase_loss", "same_answer_twice", "twin_fidelity"} <= set(names)


def resumed(place: Path, words: dict[str, Any]) -> None:
    os.chdir(place)
    verifier.verify("net.onnx", resume=True, **words)


def test_killed_at_any_moment_verify_goes_on_to_the_same_verdict(desk) -> None:
    attacks = ",".join(f"pgd{steps}x3-margin" for steps in range(100, 130))
    words = ("--data", "photos", "--attack", attacks, "--epsilon", "0.5/255")
    whole = verify(desk, *words)[1]
    assert not list((desk / "edgekit-verdicts").glob(".*"))
    shutil.rmtree(desk / "edgekit-verdicts")
    # Forked from a process that has imported all and computed nothing, so that ten starts take no minute.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["edgekit.verifier", "edgekit.twin", "onnx", "scipy.special"])
    draw, found = random.Random(0), 0
    for _ in range(10):
        process = context.Process(
            target=resumed, args=(desk, {"data": "photos", "attack": attacks, "epsilon": "0.5/255"})
        )
        process.start()
        more = draw.randrange(3)  # 0: it is killed while it starts, or before its first part is whole
        deadline = time.monotonic() + 60
        while len(list((desk / "edgekit-verdicts").glob(".*/*.safetensors"))) < found + more:
            assert time.monotonic() < deadline and process.is_alive()
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.2 if more else 1))
        process.kill()
        process.join()
        left = len(list((desk / "edgekit-verdicts").glob(".*/*.safetensors")))
        assert found + more <= left < 30  # it did not begin anew, and it was not through
        found = left
    assert found >= 5
    last = verify(desk, *words, "--resume")
    assert f"{found} finished parts are taken up" in last[2]
    assert timeless(last[1]) == timeless(whole)
    assert not list((desk / "edgekit-verdicts").glob(".*"))


def test_ctrl_c_keeps_what_is_finished_and_prints_the_command_that_continues(desk) -> None:
    attacks = ",".join(f"pgd{steps}x3-margin" for steps in range(300, 312))
    words = ["verify", "net.onnx", "--data", "photos", "--attack", attacks, "--epsilon", "0.5/255"]
    process = subprocess.Popen(
        [sys.executable, "-m", "edgekit", *words],
        cwd=desk,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=interruptible,
    )
    deadline = time.monotonic() + 60
    while not list((desk / "edgekit-verdicts").glob(".*/*.safetensors")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    said = process.communicate(timeout=60)[1].strip().splitlines()[-1]
    assert process.returncode == 130
    assert "finished parts are kept. Continue with: edgekit verify net.onnx" in said
    again = shlex.split(said.partition("Continue with: edgekit ")[2])
    assert again == [*words, "--resume"]
    done = command(*again, cwd=desk)
    assert done.returncode == 0
    assert "finished parts are taken up" in done.stderr


def timeless(verdict: Any) -> Any:
    if isinstance(verdict, dict):
        return {key: timeless(value) for key, value in verdict.items() if not key.endswith("seconds")}
    return [timeless(item) for item in verdict] if isinstance(verdict, list) else verdict


def test_a_verdict_without_gradients_says_so_and_an_old_damaged_one_is_passed_over(desk) -> None:
    (desk / "edgekit-verdicts" / "1").mkdir(parents=True)
    (desk / "edgekit-verdicts" / "1" / "verdict.json").write_text("[" * 100_000)
    code, verdict, _ = verify(desk, "--data", "photos", "--attack", "square300", "--epsilon", "2/255")
    assert (code, verdict["looks"], verdict["report"]) == (0, 1, "edgekit-verdicts/2/report.html")
    assert "it rests on its scores alone" in verdict["artifacts"][0]["why"]


def test_a_refused_file_leaves_no_unfinished_parts(desk) -> None:
    model = onnx.load(desk / "net.onnx")
    for tensor in model.graph.initializer:
        if tensor.name == "bias":
            tensor.CopyFrom(numpy_helper.from_array(numpy.full(3, numpy.nan, numpy.float32), "bias"))
    onnx.save(model, desk / "net.onnx")
    code, _, said = verify(desk, "--data", "photos", "--attack", "fgsm")
    assert code == 2
    assert "infinities, or with numbers that are none" in said or "not finite" in said or "no number" in said
    assert not list(desk.glob("edgekit-verdicts/.*"))
