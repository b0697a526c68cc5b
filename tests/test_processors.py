"""Other processors: what --on takes, what is said where one is not set up, and their real kernels where it is."""

from pathlib import Path

import onnx
import pytest
import torch
from commandline import command
from saturating import emulated, saturating

from edgekit import judge, ort, places, processors, twin
from edgekit.errors import EdgekitError
from edgekit.saturation import quantum, unsafe_pairs

IMAGES = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def clipping(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saturating(tmp_path_factory.mktemp("file") / "clips.onnx")


def test_native_comes_first_and_each_processor_once():
    assert processors.parse("arm64, native,arm64,x86-avx2") == ("native", "arm64", "x86-avx2")
    with pytest.raises(EdgekitError, match=r"there is no processor 'x86-avx'. Did you mean 'x86-avx2'\?") as caught:
        processors.parse("x86-avx")
    assert caught.value.exit_code == 2


def test_a_processor_that_is_not_set_up_is_exit_code_4_and_the_command_that_does_it(tmp_path: Path):
    words = ("verify", tmp_path / "any.onnx", "--on", "native,arm64,wasm")
    done = command(*words, cwd=tmp_path, EDGEKIT_CACHE=str(tmp_path / "empty"))
    assert done.returncode == 4
    assert "arm64 and wasm are not set up on this machine. Run: python -m edgekit.processors arm64 wasm" in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "empty").exists()
    done = command(*words, "--judge", "tcp://127.0.0.1:1", cwd=tmp_path)
    assert (done.returncode, "Leave one of them out" in done.stderr) == (2, True)


def test_set_up_fetches_once_and_believes_nothing_that_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fetched: list[str] = []
    monkeypatch.setattr(processors, "_home", lambda: tmp_path)
    monkeypatch.setattr(processors, "_fetch_qemu", lambda: fetched.append("qemu"))
    monkeypatch.setattr(processors, "_fetch_arm", lambda place: fetched.append("arm"))

    def broken(name: str) -> str:
        raise EdgekitError(f"{name} does not start", exit_code=4)

    monkeypatch.setattr(processors, "probe", broken)
    with pytest.raises(EdgekitError, match="arm64 does not start"):
        processors.set_up("arm64")
    assert not processors.ready("arm64")
    monkeypatch.setattr(processors, "probe", lambda name: "it runs")
    processors.set_up("arm64")
    assert processors.ready("arm64")
    assert not processors.ready("x86-sse")
    before = list(fetched)
    processors.set_up("arm64")
    assert fetched == before == ["qemu", "arm", "qemu", "arm"]
    # Another version of the runtime is another processor's place: what was set up for this one is not taken for it.
    monkeypatch.setattr(processors, "_installed", lambda package: "9.9.9")
    assert not processors.ready("arm64")


def test_the_runtime_of_each_processor_says_how_it_is_run():
    assert "under qemu-aarch64 -cpu cortex-a76" in processors.runtime("arm64")
    assert processors.runtime("wasm").startswith("onnxruntime-web ")
    assert processors.runtime("native") == judge.runtime("onnx")


@pytest.mark.parametrize("saturates", [True, False])
def test_where_nothing_is_asked_the_arithmetic_that_is_not_here_is_judged_too(
    clipping: Path, monkeypatch: pytest.MonkeyPatch, saturates: bool
):
    monkeypatch.setattr(places.machine, "saturates", lambda: saturates)
    (other,) = places.both_arithmetics(clipping, lambda raw: raw, threads=1)
    assert other.processor == ("exact" if saturates else "clipping")
    assert other.open is not None
    answers = other.open()(IMAGES)
    exact = judge.open(clipping, threads=1, options=ort.PRECISE)(IMAGES)
    assert answers.equal(exact) == saturates
    assert twin.open(clipping, clips=True)(IMAGES).equal(answers) != saturates


def test_the_pairs_of_a_foreign_file_are_counted_and_its_quantum_read(clipping: Path, tmp_path: Path):
    pairs = unsafe_pairs(onnx.load(clipping))
    assert set(pairs) == {"kernel", "weights"}
    assert min(pairs.values()) > 20
    assert set(unsafe_pairs(onnx.load(saturating(tmp_path / "safe.onnx", largest=64))).values()) == {0}
    assert quantum(onnx.load(clipping), "y") == 0.5
    # Where the sums are the scores, their own step: 0.04 of the activations times 1/127 of the weights.
    assert quantum(onnx.load(clipping), "m") == pytest.approx(0.04 / 127)
    assert quantum(onnx.load(clipping), "x") is None


@pytest.mark.parametrize("kind", ["QLinearConv", "MatMulInteger", "QGemm", "DynamicQuantizeMatMul"])
def test_operators_of_integers_pair_too_unless_their_activations_are_signed(kind: str):
    weights = onnx.numpy_helper.from_array(torch.full((4, 4, 1, 1)[: 4 if "Conv" in kind else 2], 127).numpy(), "w")
    weights.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weights).astype("int8"), "w"))
    inputs = {
        "QLinearConv": ["x", "s", "z", "w", "s", "zw", "s", "z"],
        "MatMulInteger": ["x", "w", "z", "zw"],
        "QGemm": ["x", "s", "z", "w", "s", "zw"],
        "DynamicQuantizeMatMul": ["x", "w", "s", "zw"],
    }[kind]
    for zero, expected in (("uint8", 8), ("int8", 0 if kind != "DynamicQuantizeMatMul" else 8)):
        constant = onnx.numpy_helper.from_array(torch.zeros(()).numpy().astype(zero), "z")
        graph = onnx.helper.make_graph([onnx.helper.make_node(kind, inputs, ["y"])], "g", [], [], [weights, constant])
        assert sum(unsafe_pairs(onnx.helper.make_model(graph)).values()) == expected


@pytest.mark.parametrize("name", ["x86-avx2", "x86-sse", "arm64", "wasm"])
def test_a_file_made_to_saturate_tells_the_processors_apart(
    clipping: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    emulated(monkeypatch, name)
    there = judge.start_on(name, clipping)(IMAGES)
    clips = twin.open(clipping, clips=True)(IMAGES)
    exact = twin.open(clipping)(IMAGES)
    assert clips.ne(exact).any(1).float().mean() > 0.5
    # What AVX2 answers, clipping included, and all others do not: bit for bit.
    assert there.equal(clips if name == "x86-avx2" else exact)
    safe = saturating(tmp_path / "safe.onnx", largest=64)
    assert judge.start_on(name, safe)(IMAGES).equal(judge.open(safe, threads=1)(IMAGES))


@pytest.mark.parametrize("name", ["x86-avx2", "arm64", "wasm"])
def test_a_file_that_is_none_is_one_sentence_there_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    emulated(monkeypatch, name)
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(EdgekitError, match="does not take the file"):
        judge.start_on(name, tmp_path / "text.onnx")
