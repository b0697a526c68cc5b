"""The fresh process that a cold start is timed in."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
from graphs import convolutional, save
from onnx.helper import make_node

LARGE = 40 * 2**20


def started(file: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgekit.judge.cold", str(file), "--format", "onnx", "--shape", "3,8,8", *more]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": "."}, check=False)


def test_memory_is_the_files_own_and_not_what_the_parent_once_had(tmp_path: Path):
    parents = bytearray(300 * 2**20)  # Linux would hand this peak on to the child
    small = json.loads(started(convolutional(tmp_path / "small.onnx"), "--batch", "1").stdout)
    assert 0 < small["memory"][0] <= small["memory"][1] < 40 * 2**20
    nodes = [make_node("Flatten", ["x"], ["f"]), make_node("MatMul", ["f", "w"], ["y"])]
    weights = numpy.ones((192, LARGE // 192 // 4), "float32")
    large = json.loads(started(save(tmp_path / "large.onnx", nodes, w=weights), "--batch", "1").stdout)
    assert large["memory"][0] > 0.9 * LARGE + small["memory"][0] / 2
    # 10,000 answers of 1,000 scores; a child that answered one image only would not need their memory.
    wide = json.loads(started(save(tmp_path / "wide.onnx", nodes, w=weights[:, :1000]), "--batch", "10000").stdout)
    assert wide["memory"][1] > wide["memory"][0] + 0.9 * 4 * 10_000 * 1000
    assert large["seconds"] > 0 and len(parents)


def test_a_file_that_the_runtime_refuses_is_one_sentence(tmp_path: Path):
    (tmp_path / "bad.onnx").write_bytes(b"no model at all")
    done = started(tmp_path / "bad.onnx", "--batch", "1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip().startswith("ONNX Runtime does not take the file")


def test_nothing_slow_is_loaded_for_an_onnx_file(tmp_path: Path):
    code = (
        "import sys, os; from edgekit.judge import cold; import edgekit.judge.cold as c\n"
        "c.os._exit = lambda status: (_ for _ in ()).throw(SystemExit(status))\n"
        f"sys.argv = ['cold', {str(convolutional(tmp_path / 'a.onnx'))!r}, '--shape', '3,8,8', '--batch', '2']\n"
        "try: cold.main()\nexcept SystemExit: sys.stderr.write(str('torch' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.endswith("False")
