"""A file in its own process: the same answers, and one sentence for a file that kills, hangs or eats its runtime."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import onnx
import pytest
import torch
from graphs import convolutional, save
from onnx import TensorProto
from onnx.helper import make_node

from edgekit import judge
from edgekit.errors import EdgekitError
from edgekit.judge import Remote

IMAGES = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    convolutional(folder / "model.onnx")
    layers = [torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(576, 10)]
    torch.jit.trace(torch.nn.Sequential(*layers).eval(), IMAGES).save(folder / "model.pt")
    save(folder / "flat.onnx", [make_node("Flatten", ["x"], ["y"])])
    # The least integer divided by -1: what the processor does not compute, and ONNX Runtime does not catch.
    save(
        folder / "kills.onnx",
        [
            make_node("Flatten", ["x"], ["flat"]),
            make_node("Cast", ["flat"], ["whole"], to=TensorProto.INT64),
            make_node("Sub", ["whole", "whole"], ["zero"]),  # from the input, so that nothing is computed beforehand
            make_node("Add", ["zero", "least"], ["a"]),
            make_node("Add", ["zero", "minus"], ["b"]),
            make_node("Div", ["a", "b"], ["quotient"]),
            make_node("Cast", ["quotient"], ["y"], to=TensorProto.FLOAT),
        ],
        least=numpy.array(-(2**63), "int64"),
        minus=numpy.array(-1, "int64"),
    )
    value = onnx.helper.make_tensor_value_info
    body = onnx.helper.make_graph(
        [make_node("Identity", ["on"], ["still"]), make_node("Neg", ["v"], ["w"])],
        "body",
        [value("i", TensorProto.INT64, []), value("on", TensorProto.BOOL, []), value("v", TensorProto.FLOAT, None)],
        [value("still", TensorProto.BOOL, []), value("w", TensorProto.FLOAT, None)],
    )
    save(
        folder / "hangs.onnx",
        [make_node("Flatten", ["x"], ["flat"]), make_node("Loop", ["turns", "yes", "flat"], ["y"], body=body)],
        turns=numpy.array(2**62),
        yes=numpy.array(True),
    )
    # 512 MiB, asked for when it runs.
    save(
        folder / "eats.onnx",
        [
            make_node("Flatten", ["x"], ["flat"]),
            make_node("ReduceMin", ["flat"], ["least"], keepdims=0),
            make_node("Expand", ["least", "shape"], ["much"]),
            make_node("ReduceMax", ["much"], ["most"], keepdims=0),
            make_node("Mul", ["flat", "most"], ["y"]),
        ],
        shape=numpy.array([2**27]),
    )
    (folder / "text.onnx").write_text("not a model")
    return folder


@pytest.mark.parametrize("file", ["model.onnx", "model.pt"])
def test_the_child_answers_bit_by_bit_as_this_process_does(folder: Path, file: str):
    alone = judge.open(folder / file, threads=1, trust=True)
    here = judge.open(folder / file, threads=1, trust=True, isolated=False)
    assert isinstance(alone, Remote)
    assert not isinstance(here, Remote)
    assert not alone.differentiable
    for images in (IMAGES, torch.rand(64, 3, 8, 8), IMAGES[:1], IMAGES[:0]):
        assert alone(images).equal(here(images))
        assert alone(images).shape == (len(images), 10)
    alone.close()


def test_for_an_onnx_file_neither_torch_nor_anything_else_slow_is_loaded(folder: Path):
    code = (
        "import argparse, sys; from edgekit.judge import child; p = argparse.ArgumentParser(); child.add_arguments(p);"
        f"scores, classes = child.opened(p.parse_args([{str(folder / 'model.onnx')!r}]));"
        "print(classes, [m for m in ('torch', 'onnx', 'scipy', 'pydantic', 'rich') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "10 []"


@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        ("kills.onnx", "ONNX Runtime was killed by SIGFPE before its answer to 5 images of 3x8x8"),
        ("hangs.onnx", "ONNX Runtime did not answer 5 images of 3x8x8 within 1.5 s. Allow more `seconds`"),
        ("eats.onnx", "needs more memory than the 0.25 GiB that it may take. Allow more `memory`"),
        ("model.onnx", r"its runtime fails \(.*Got invalid dimensions for input: x.*\)"),
        ("text.onnx", r"ONNX Runtime does not take the file \(.*\)"),
        ("missing.onnx", "there is no such file"),
        ("x.model", r"no model file that edgekit opens. Known: \.onnx, .*, \.xml, .*"),
        ("model.pt", r"opening TorchScript can run code of the file. Trust it: --trust-file"),
    ],
)
def test_a_file_that_its_runtime_does_not_survive_is_one_sentence(folder: Path, file: str, sentence: str):
    begin = time.monotonic()
    with pytest.raises(EdgekitError) as caught:
        images = IMAGES if file != "model.onnx" else torch.zeros(5, 3, 9, 9)
        judge.open(folder / file, threads=1, memory=2**28, seconds=1.5 if file == "hangs.onnx" else 60)(images)
    assert re.fullmatch(f"{re.escape(str(folder / file))}: {sentence}", str(caught.value))
    assert caught.value.exit_code == 2
    assert time.monotonic() - begin < 30


def test_within_its_memory_a_large_file_runs(folder: Path):
    least = IMAGES.min()
    with judge.start(folder / "eats.onnx", threads=1, memory=2**30) as asked:
        assert asked(IMAGES).allclose(IMAGES.flatten(1) * least)


RUNTIME = """
import enum, os
GraphOptimizationLevel = enum.Enum("Level", "ORT_DISABLE_ALL ORT_ENABLE_BASIC ORT_ENABLE_EXTENDED ORT_ENABLE_ALL")
class SessionOptions:
    def __init__(self): self.entries = {}
    def add_session_config_entry(self, key, value): self.entries[key] = value
class Value:
    name, type, shape = "x", "tensor(float)", ["n", 3, 8, 8]
class InferenceSession:
    def __init__(self, path, options, providers):
        self.options = options
        os.write(1, b"noise" * 1000)
        print("more of it", flush=True)
        if open(path, "rb").read() == b"abort": os.write(2, b"corrupted \\x1b[31msize\\n"); os.abort()
    def get_inputs(self): return [Value]
    def get_outputs(self): return [Value]
    def run(self, names, feed):
        if len(feed["x"]) == 5:
            level = self.options.graph_optimization_level.name
            raise RuntimeError(f"{self.options.intra_op_num_threads} {level} {sorted(self.options.entries.items())}")
        return [feed["x"].reshape(len(feed["x"]), -1)]
"""


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A runtime that prints on stdout, and says in its error how it was set up; it stands before the real one."""
    (tmp_path / "onnxruntime.py").write_text(RUNTIME)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"")
    return tmp_path


def test_what_a_runtime_prints_is_no_score(runtime: Path):
    with judge.start(runtime / "model.onnx") as asked:
        assert asked(IMAGES[:2]).equal(IMAGES[:2].flatten(1))


def test_the_options_of_the_arithmetic_reach_the_runtime(runtime: Path):
    options = {"session.x64quantprecision": "1", "session.qdqisint8allowed": "1"}
    with (
        judge.start(runtime / "model.onnx", threads=3, options=options, optimization="basic") as asked,
        pytest.raises(EdgekitError) as caught,
    ):
        asked(IMAGES)
    entries = sorted({**options, "session.intra_op.allow_spinning": "0"}.items())
    assert f"(3 ORT_ENABLE_BASIC {entries})" in str(caught.value)
    with pytest.raises(EdgekitError, match=r"there is no optimization level 'bassic'\. Did you mean 'basic'"):
        judge.start(runtime / "model.onnx", optimization="bassic")


def test_another_interpreter_and_its_own_modules_can_be_named(folder: Path, runtime: Path):
    # The fake runtime takes what is no model; without it among the folders the file is refused.
    mark = runtime / "called"
    interpreter = ["/bin/sh", "-c", f'touch \'{mark}\'; exec "$0" "$@"', sys.executable]
    with judge.start(runtime / "model.onnx", interpreter=interpreter, search=[str(runtime)]) as asked:
        assert asked(IMAGES[:1]).equal(IMAGES[:1].flatten(1))
    assert mark.exists()
    with pytest.raises(EdgekitError, match="ONNX Runtime does not take the file"):
        judge.start(runtime / "model.onnx", search=[])
    with pytest.raises(EdgekitError, match=r"^/nowhere/python: a child process cannot be started") as caught:
        judge.start(runtime / "model.onnx", interpreter=["/nowhere/python"])
    assert caught.value.exit_code == 4


def test_a_runtime_that_aborts_while_it_opens_is_one_sentence(runtime: Path):
    (runtime / "model.onnx").write_bytes(b"abort")
    with pytest.raises(EdgekitError) as caught:
        judge.open(runtime / "model.onnx")
    sentence = r"ONNX Runtime was killed by SIGABRT while it opened the file; its last words: corrupted \x1b[31msize"
    assert str(caught.value) == f"{runtime / 'model.onnx'}: {sentence}"


def test_the_child_takes_no_module_from_the_working_directory(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for module in ("numpy", "onnxruntime", "argparse"):
        (tmp_path / f"{module}.py").write_text("raise SystemExit(7)")
    monkeypatch.chdir(tmp_path)
    with judge.start(folder / "flat.onnx") as asked:
        assert asked(IMAGES).equal(IMAGES.flatten(1))


@pytest.mark.parametrize("file", ["flat.onnx", "hangs.onnx"])
def test_the_child_ends_with_its_parent_at_rest_and_at_work(folder: Path, file: str):
    code = (  # asks one question and waits for no answer; without torch, to be quick
        "import os, struct, sys; from edgekit.judge import line;"
        "asked = line.started([sys.executable, '-m', 'edgekit.judge.child', sys.argv[1]]);"
        "os.write(asked.writer, struct.pack('<4I192f', 1, 3, 8, 8, *range(192)));"
        "print(asked.process.pid, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(folder / file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        child = int(parent.stdout.readline())
        deadline = time.monotonic() + 60
        while _seconds(child) < 0.5 and time.monotonic() < deadline and file == "hangs.onnx":
            time.sleep(0.02)  # until it is at work, past its imports
        assert _runs(child)
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _runs(child)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _seconds(pid: int) -> float:
    """Of processor time that it has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
