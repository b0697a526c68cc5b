"""What inspect says of files, and that it opens nothing that could run."""

import json
from pathlib import Path

import pytest
import torch
from commandline import command
from safetensors.torch import save_file
from test_foreign import file

from edgekit.errors import EdgekitError
from edgekit.inspector import inspect

STUDENT = Path(__file__).parents[1] / "benchmarks/students/cifar10-mobilenet-cpu/student.safetensors"


def test_an_onnx_file_is_described_as_verify_would_take_it(tmp_path) -> None:
    said = inspect(file(tmp_path / "net.onnx", metadata={"names": '["cat", "dog", "eel"]'}))
    assert (said["kind"], said["precision"], said["classes"]) == ("onnx", "fp32", 3)
    assert said["names"] == ("cat", "dog", "eel")
    assert said["operators"]["float"]["Conv"] == 1
    assert said["takes"] == "RGB, NCHW, 8 x 8, in [0, 1], not normalized; it answers scores"


def test_what_verify_would_ask_for_is_said(tmp_path) -> None:
    said = inspect(file(tmp_path / "net.onnx", shape=("n", "c", "h", "w")))
    assert "--layout" in said["verify"]
    assert "takes" not in said


def test_weights_name_their_network_and_count_their_numbers(tmp_path) -> None:
    said = inspect(STUDENT)
    assert (said["student"]["architecture"], said["student"]["width"]) == ("mobilenetv2", 0.5)
    save_file({"a": torch.zeros(3, 4), "b": torch.zeros(5)}, tmp_path / "w.safetensors")
    assert inspect(tmp_path / "w.safetensors")["numbers"] == 17


@pytest.mark.parametrize("name", ["none.onnx", "w.safetensors", ".", "x.onnx", "x.pt"])
def test_what_is_none_of_it_is_refused(tmp_path, name) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"\xff" * 16)  # a header that announces more than there is on earth
    (tmp_path / "x.onnx").write_bytes(b"x")
    (tmp_path / "x.pt").write_bytes(b"no archive at all")
    with pytest.raises(EdgekitError):
        inspect(tmp_path / name)


def test_the_commands_list_what_there_is(tmp_path) -> None:
    for name, known in (("attacks", "autoattack"), ("methods", "rslad")):
        rows = json.loads(command(name, "--json", cwd=tmp_path).stdout)
        assert known in [row["name"] for row in rows]
        assert known in command(name, cwd=tmp_path).stdout
    shown = command("inspect", STUDENT, cwd=tmp_path).stdout
    assert "mobilenetv2" in shown
    assert json.loads(command("inspect", STUDENT, "--json", cwd=tmp_path).stdout)["kind"] == "safetensors"
