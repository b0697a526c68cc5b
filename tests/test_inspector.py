"""What inspect says of files, and that it opens nothing that could run."""

import json
import os
from pathlib import Path
from typing import Any

import numpy
import onnx
import pytest
import torch
from commandline import command
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from safetensors.torch import save_file
from saturating import saturating
from test_foreign import SIDE, file
from test_verdict import document as verdict_of
from test_verdict import paired_file

from edgekit import quantize, trial
from edgekit.errors import EdgekitError
from edgekit.files import sha256
from edgekit.formats import onnx as onnx_format
from edgekit.formats import torchscript
from edgekit.inspector import inspect
from edgekit.verdict import to_dict

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


class Images(CalibrationDataReader):
    """Three batches for ONNX Runtime's own quantizer."""

    def __init__(self) -> None:
        draw = numpy.random.default_rng(0)
        self.left = [draw.random((4, 3, SIDE, SIDE), numpy.float32) for _ in range(3)]

    def get_next(self) -> dict[str, Any]:
        return {"images": self.left.pop()} if self.left else {}


def foreign_int8(path: Path, form: str) -> Path:
    source, quantized = file(path / "float.onnx"), path / "int8.onnx"
    if form == "dynamic":
        quantize_dynamic(source, quantized, op_types_to_quantize=["MatMul", "Gemm"])
    else:
        options: dict[str, Any] = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        quantize_static(source, quantized, Images(), quant_format=QuantFormat[form], **options)
    return quantized


@pytest.mark.parametrize(
    ("form", "integers"),
    [
        ("QDQ", {"Conv": 1, "Flatten": 1, "Gemm": 1, "GlobalAveragePool": 1}),
        ("QOperator", {"QLinearConv": 1, "Flatten": 1, "QGemm": 1, "QLinearGlobalAveragePool": 1}),
        ("dynamic", {"MatMulInteger": 1}),
    ],
)
def test_what_others_have_quantized_is_told_by_its_form(tmp_path, form: str, integers: dict[str, int]) -> None:
    said = inspect(foreign_int8(tmp_path, form))
    assert said["precision"] == "int8"
    assert said["quantization"].partition(":")[0] == form
    assert said["operators"]["int8"] == integers
    kinds = [node.op_type for node in onnx.load(tmp_path / "int8.onnx").graph.node]
    converting = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
    assert sum(said["operators"].get("float", {}).values()) == len(
        [kind for kind in kinds if kind not in (*converting, *integers)]
    )
    # Their 8-bit weights fill their range, and 127 + 127 is more than 128.
    assert said["saturation"]["can_saturate"] is True
    assert said["saturation"]["layers"] == (1 if form == "dynamic" else 2)
    assert said["output"] == {"scores": ["batch", 3]}
    assert said["producer"].startswith("onnx.quantize")


@pytest.mark.parametrize("largest", [127, 64])
def test_whether_sums_can_clip_is_read_from_the_weights(tmp_path, largest: int) -> None:
    said = inspect(saturating(tmp_path / "net.onnx", largest))["saturation"]
    model = onnx.load(tmp_path / "net.onnx")
    weights = {each.name: numpy_helper.to_array(each).astype(int) for each in model.graph.initializer}
    # One pair after the other, with the activation that is worst for it: 255 where the weight has the sign, else 0.
    rows = [*weights["kernel"].transpose(0, 2, 3, 1).reshape(16, -1), *weights["weights"].T]
    pairs = [(int(a), int(b)) for row in rows for a, b in zip([*row, 0][0::2], [*row, 0][1::2], strict=False)]
    worst = [255 * sum(w for w in pair if sign * w > 0) for pair in pairs for sign in (1, -1)]
    unsafe = sum(not low >= -(2**15) or not high < 2**15 for high, low in zip(worst[::2], worst[1::2], strict=True))
    assert said["unsafe_pairs"] == unsafe
    assert said["can_saturate"] == (largest == 127) == (unsafe > 0)
    assert said["layers"] == 2


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of edgekit's, int8, with an artifact.json of its own beside it."""
    folder = tmp_path_factory.mktemp("onnx-int8")
    student = trial.small()
    made = quantize.quantize(
        onnx_format.lower(student),
        torch.rand(32, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
        quantize.SCHEMES["x86"],
    )
    metadata = {"edgekit": "0.1.0", "outputs": "logits", "classes": json.dumps(student.classes)}
    onnx_format.write_model(quantize.slim(made.model), folder, metadata)
    path = folder / "model.onnx"
    record = {
        "schema": 1,
        "edgekit": "0.1.0",
        "format": "onnx",
        "precision": "int8",
        "scheme": quantize.SCHEMES["x86"].record(),
        "operators": onnx_format.running(path),
        "files": [{"path": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}],
        "made_from": {"run": "mobilenet-1", "seed": 3},
        "calibration": made.calibration | {"candidates": [{"method": "mse", "number": i} for i in range(9)]},
        "versions": {"torch": "2.14.1"},
    }
    (folder / "artifact.json").write_text(json.dumps(record))
    return folder


def test_a_file_of_ours_says_how_it_was_made_and_what_its_runtime_makes_of_it(artifact: Path, tmp_path) -> None:
    said = inspect(artifact / "model.onnx")
    assert said["made_from"] == {"run": "mobilenet-1", "seed": 3}
    assert said["calibration"]["images"] == 32
    assert (said["edgekit"], said["versions"]["torch"]) == ("0.1.0", "2.14.1")
    assert said["in_its_runtime"] == onnx_format.running(artifact / "model.onnx")
    assert (said["operators"]["int8"]["Conv"], said["operators"]["int8"]["Gemm"]) == (1, 1)
    assert said["saturation"] == {"can_saturate": False, "layers": 2, "unsafe_layers": 0, "unsafe_pairs": 0}
    assert said["quantization"].startswith("QDQ")
    assert (said["sha256"], said["classes"]) == (sha256(artifact / "model.onnx"), 4)
    for name in (".", "artifact.json"):
        assert inspect(artifact / name)["kind"] == "artifact"
    shown = command("inspect", artifact / "model.onnx", cwd=tmp_path).stdout
    assert "9 entries, which --json shows" in shown
    assert "saturation.can_saturate" in shown
    # Another file in that folder was made otherwise.
    other = file(artifact / "other.onnx")
    assert "made_from" not in inspect(other)
    other.unlink()


def test_a_changed_file_is_not_said_to_be_made_as_it_was(artifact: Path, tmp_path) -> None:
    for path in artifact.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    file(tmp_path / "model.onnx")
    with pytest.raises(EdgekitError, match="has changed since it was exported"):
        inspect(tmp_path / "model.onnx")


def test_a_float_file_has_no_saturation_and_its_weights_beside_it_have_a_digest(tmp_path) -> None:
    said = inspect(file(tmp_path / "net.onnx"))
    assert "saturation" not in said and "quantization" not in said
    assert said["external"] is None
    options = {"save_as_external_data": True, "location": "weights.bin", "size_threshold": 0}
    onnx.save(onnx.load(tmp_path / "net.onnx"), tmp_path / "large.onnx", **options)
    said = inspect(tmp_path / "large.onnx")
    assert said["external"] == {"weights.bin": sha256(tmp_path / "weights.bin")}
    assert said["classes"] == 3


def test_a_torchscript_file_of_ours_says_what_it_takes_and_nothing_of_it_is_run(tmp_path) -> None:
    takes = {"shape": [None, 3, 8, 8], "layout": "NCHW"}
    torchscript.write(trial.small(), tmp_path, {"input": json.dumps(takes), "outputs": "logits", "edgekit": "0.1.0"})
    for name in ("model.pt", "model.ptl"):
        said = inspect(tmp_path / name)
        assert (said["input"], said["output"], said["precision"]) == (takes, "logits", "fp32")
        assert said["calls in its code"]["_convolution"] == 1
        assert said["runs"].startswith("nothing was run")


def test_a_verdict_is_told_in_short(tmp_path) -> None:
    document = to_dict(verdict_of(paired_file()))
    (tmp_path / "verdict.json").write_text(json.dumps(document))
    for path in (tmp_path, tmp_path / "verdict.json"):
        said = inspect(path)
        assert (said["kind"], said["verdict"], said["samples"]) == ("verdict", document["verdict"], document["samples"])
        assert [one["name"] for one in said["artifacts"]] == [one["name"] for one in document["artifacts"]]
    (tmp_path / "release.json").write_text(json.dumps(document))
    assert inspect(tmp_path / "release.json")["sha256"] == sha256(tmp_path / "release.json")


def test_a_run_names_its_artifacts_and_the_verdicts_on_them(tmp_path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"schema": 1, "status": "finished", "seed": 5}))
    (tmp_path / "artifacts" / "onnx-fp32").mkdir(parents=True)
    document = to_dict(verdict_of(paired_file()))
    for number in ("2", "10"):
        (tmp_path / "verdicts" / number).mkdir(parents=True)
        (tmp_path / "verdicts" / number / "verdict.json").write_text(json.dumps(document))
    (tmp_path / "verdicts" / "11").mkdir()  # one that was interrupted
    for path in (tmp_path, tmp_path / "run.json"):
        said = inspect(path)
        assert (said["kind"], said["status"], said["artifacts"]) == ("run", "finished", ["onnx-fp32"])
        assert list(said["verdicts"].items()) == [("2", document["verdict"]), ("10", document["verdict"])]


GARBAGE = {
    "w.safetensors": b"\xff" * 16,  # a header that announces more than there is on earth
    "x.onnx": b"x",
    "noise.onnx": bytes(range(256)) * 40,
    "x.pt": b"no archive at all",
    "x.bin": b"\x00" * 4096,
    "empty.onnx": b"",
    "x.json": b'{"schema": 1}',
    "list.json": b"[1]",
    "broken.json": b"{",
    "x.textproto": b"graph {",
    "x.onnxtxt": b"<ir_version: 7>",
    "x.toml": b'[student]\nname = "a"\n',
}


@pytest.mark.parametrize("name", ["none.onnx", ".", "pipe.onnx", *GARBAGE])
def test_what_is_none_of_it_is_refused(tmp_path, name) -> None:
    if name in GARBAGE:
        (tmp_path / name).write_bytes(GARBAGE[name])
    os.mkfifo(tmp_path / "pipe.onnx")
    with pytest.raises(EdgekitError) as caught:
        inspect(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["run.json", "artifact.json", "verdict.json"])
@pytest.mark.parametrize("text", ["[]", "{", '{"schema": 1}', "null"])
def test_a_damaged_record_is_one_sentence(tmp_path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    if (name, text) == ("run.json", '{"schema": 1}'):
        assert inspect(tmp_path)["kind"] == "run"
        return
    with pytest.raises(EdgekitError):
        inspect(tmp_path)
    with pytest.raises(EdgekitError):
        inspect(tmp_path / name)


def test_weights_whose_metadata_is_no_table_are_still_counted(tmp_path) -> None:
    save_file({"a": torch.zeros(3, 4, dtype=torch.float16)}, tmp_path / "w.safetensors", {"edgekit": "[1]"})
    said = inspect(tmp_path / "w.safetensors")
    assert (said["tensors"], said["metadata"]) == ({"F16": 1}, {"edgekit": "[1]"})


def test_the_commands_list_what_there_is(tmp_path) -> None:
    for name, known in (("attacks", "autoattack"), ("methods", "rslad")):
        rows = json.loads(command(name, "--json", cwd=tmp_path).stdout)
        assert known in [row["name"] for row in rows]
        assert known in command(name, cwd=tmp_path).stdout
    shown = command("inspect", STUDENT, cwd=tmp_path).stdout
    assert "mobilenetv2" in shown
    assert json.loads(command("inspect", STUDENT, "--json", cwd=tmp_path).stdout)["kind"] == "safetensors"
