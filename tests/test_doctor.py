"""What doctor says where something does not work: each fault is made, and all else is still answered."""

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest
import torch
from commandline import command, interruptible

import edgekit
from edgekit import doctor, machine, processors, trial
from edgekit.artifact import JUDGED
from edgekit.doctor import NO, NOT_NEEDED, YES, Outcome
from edgekit.errors import EdgekitError
from edgekit.formats import FORMATS
from edgekit.judge import runtime

ROOT = Path(edgekit.__file__).parents[1]
SCHEMA = json.loads((ROOT / "edgekit/schemas/doctor.json").read_text())
CRASH = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"


def module(folder: Path, name: str, code: str) -> Path:
    """A package in `folder` that stands before the real one."""
    (folder / f"{name}.py").write_text(textwrap.dedent(code))
    return folder


def rows(document: dict) -> dict[str, dict]:
    jsonschema.validate(document, SCHEMA)
    return {row["what"]: row for row in document["rows"]}


def fine(lists: list[list[str]]) -> dict[str, Outcome]:
    """`ask` on a machine where all works."""
    return {word: Outcome(word) for words in lists for word in words}


# On this machine ------------------------------------------------------------------------------------------------------


def test_formats_are_written_opened_and_compared_and_other_files_are_noticed(monkeypatch: pytest.MonkeyPatch):
    assert set(JUDGED) == set(FORMATS)  # what the rows are named after is read without torch
    found = trial.tried("format:onnx")["found"]
    assert found == f"fp32, fp16 and int8: written, opened and compared in {runtime('onnx')}"
    assert (trial.tried("format:torchscript")["found"] or "").startswith("fp32: written")
    before = FORMATS["torchscript"].open
    for wrong in (lambda scores: scores.flip(1), lambda scores: scores * torch.nan, lambda scores: scores[:, :3]):
        monkeypatch.setattr(
            FORMATS["torchscript"], "open", lambda *a, w=wrong, **k: lambda x: w(before(*a, **k)(x)), raising=True
        )
        assert "answer" in str(trial.tried("format:torchscript")["fault"])


def test_int8_that_is_run_in_float_is_noticed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(FORMATS["onnx"], "running", lambda path: {"int8": 0, "float": {}})
    assert "none of its operators on integers" in str(trial.tried("format:onnx")["fault"])


def test_the_oldest_versions_are_those_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    floors = doctor.requirements()
    assert [f"{name}>={least}" for name, least in floors.items()] == project["dependencies"]
    # Every one of them is imported by its own name: none is mistaken for another.
    named = importlib.metadata.packages_distributions()
    for name in floors:
        owners = named[trial.MODULES.get(name, name).split(".")[0]]
        assert name in [owner.lower() for owner in owners]


@pytest.mark.slow
def test_the_command_prints_a_table_or_one_document(tmp_path: Path):
    """All of it, as it is here."""
    done = command("doctor", "--json", cwd=tmp_path, PYTHONPATH=str(ROOT), EDGEKIT_CACHE=str(tmp_path / "none"))
    found = rows(json.loads(done.stdout))
    assert done.returncode == 0, done.stdout
    working = ("python", "torch", "onnx", "onnxruntime", *doctor._CORE, "digits")
    assert all(found[name]["works"] == YES for name in working)
    assert found["torch"]["found"] == importlib.metadata.version("torch")
    assert found["arm64"]["mend"] == processors.command(["arm64"])
    assert not (tmp_path / "none").exists()
    assert list(tmp_path.iterdir()) == []


# Faults ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_torch_that_kills_its_process_is_exit_code_4_and_all_else_is_answered(tmp_path: Path):
    place = module(tmp_path, "torch", CRASH)
    path = os.pathsep.join([str(place), str(ROOT)])
    done = command("doctor", "--json", cwd=tmp_path, PYTHONPATH=path, EDGEKIT_CACHE=str(tmp_path / "none"))
    found = rows(json.loads(done.stdout))
    assert done.returncode == 4
    for name in ("torch", *doctor._CORE):  # of the two rows that are called onnx the later one, the format's
        assert (found[name]["works"], found[name]["needed"]) == (NO, True)
        assert "SIGSEGV" in found[name]["found"]
        assert "pip install" in found[name]["mend"]
    assert found["onnxruntime"]["works"] == found["digits"]["works"] == found["processor"]["works"] == YES


def test_a_runtime_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    code = f"""
        import subprocess, sys, time
        from pathlib import Path
        child = subprocess.Popen(["sleep", "1000"])  # holds the streams of its parent
        Path({str(tmp_path / "pid")!r}).write_text(str(child.pid))
        time.sleep(1000)
    """
    monkeypatch.syspath_prepend(module(tmp_path, "onnxruntime", code))
    monkeypatch.setattr(doctor, "SECONDS", 2.0)
    begin = time.monotonic()
    found = doctor.ask([["package:jinja2", "package:onnxruntime", "package:rich"]])
    assert time.monotonic() - begin < 30
    assert found["package:onnxruntime"] == Outcome(None, "it gives no answer within 2 seconds")
    assert found["package:jinja2"].found and found["package:rich"].found
    pid = int((tmp_path / "pid").read_text())
    stat = Path(f"/proc/{pid}/stat")
    assert not stat.exists() or stat.read_text().split()[2] == "Z"


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        (CRASH, "it ends its process (SIGSEGV)"),
        (
            "import os; os.write(2, b'no such kernel\\n'); os._exit(3)",
            "it ends its process with status 3 (no such kernel)",
        ),
        ("raise RuntimeError('operator torchvision::nms does not exist')", "RuntimeError: operator torchvision::nms"),
        ("import nothing_of_this_name", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ('print(\'{"trial": "package:rich"}\')', None),
    ],
)
def test_a_package_that_does_not_load_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, fault: str | None
):
    monkeypatch.syspath_prepend(module(tmp_path, "onnxruntime", code))
    found = doctor.ask([["package:onnxruntime"], ["package:rich"]])
    assert found["package:rich"].found
    if fault is None:  # what a package prints is no answer
        assert found["package:onnxruntime"] == Outcome("it loads")
        return
    assert found["package:onnxruntime"].fault.startswith(fault)
    (row,) = [row for row in doctor.versions({"onnxruntime": "1.23"}, found) if row.what == "onnxruntime"]
    assert (row.works, row.needed) == (NO, True)
    assert row.mend == "pip install --force-reinstall 'onnxruntime>=1.23'"


def test_missing_and_old_packages_name_what_installs_them(monkeypatch: pytest.MonkeyPatch):
    there = {"torch": "2.11.0+cu128", "onnx": "1.9.9", "rich": "15.0.0", "jinja2": "3.1"}

    def version(name: str) -> str:
        if name not in there:
            raise importlib.metadata.PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    floors = {"torch": "2.11", "onnx": "1.21", "onnxruntime": "1.23", "rich": "13.9", "jinja2": "3.1.6"}
    outcomes = {f"package:{name}": Outcome("it loads") for name in floors}
    found = {row.what: row for row in doctor.versions(floors, outcomes)}
    assert {what: row.works for what, row in found.items()} == {
        "torch": YES, "onnx": NO, "onnxruntime": NO, "jinja2": NO, "1 others": YES,
    }  # fmt: skip
    assert found["1 others"].found == "rich 15.0.0"
    assert found["onnxruntime"].found == "not installed"
    assert found["onnxruntime"].mend == "pip install 'onnxruntime>=1.23'"
    assert "1.9.9 is too old" in found["onnx"].found


def test_an_old_python_is_said(monkeypatch: pytest.MonkeyPatch):
    assert doctor.python().works == YES
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    assert (doctor.python().works, doctor.python().mend) == (NO, "Use a Python >=3.11")


def test_a_full_disk_and_a_folder_that_takes_nothing_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDGEKIT_CACHE", "/dev/null/cache")
    free = 64 * 2**20

    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: SimpleNamespace(free=free))
    run, cache, _ = doctor.disks()
    assert (run.works, run.needed) == (NO, True)
    assert run.found == f"0.1 GiB free, {tmp_path / 'runs'}"
    assert "--run DIR" in str(run.mend)
    assert (cache.works, cache.found) == (NO, "Not a directory, /dev/null")
    assert "EDGEKIT_CACHE" in str(cache.mend)
    free = 2**40
    assert doctor.disks()[0].works == YES
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("no right to mount a tmpfs here")
    try:
        monkeypatch.chdir(tmp_path)
        (run, *_) = doctor.disks()
        assert (run.works, run.found) == (NO, f"No space left on device, {tmp_path}")
        monkeypatch.setattr(trial.tempfile, "tempdir", str(tmp_path))
        (tmp_path / "filled").write_bytes(bytes(500 * 1024))
        outcome = trial.tried("format:torchscript")
        assert outcome["fault"] == "No space left on device"
        assert "TMPDIR" in str(outcome["mend"])
    finally:
        monkeypatch.undo()
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_too_little_memory_is_said(monkeypatch: pytest.MonkeyPatch):
    total, free = machine.memory()
    assert 0 < free <= total
    assert doctor.memory().works == (YES if free >= 2**31 else NO)
    monkeypatch.setattr(machine, "memory", lambda: (2**33, 2**30))
    assert (doctor.memory().works, doctor.memory().found) == (NO, "1.0 of 8.0 GiB free")


def test_a_container_has_what_its_limit_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    whole = machine.memory()  # no files: no container
    (tmp_path / "memory.current").write_text(f"{3 * 2**28}\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.memory()[0] == whole[0]
    (tmp_path / "memory.max").write_text(f"{2**30}\n")
    assert machine.memory() == (2**30, 2**28)
    assert doctor.memory().found == "0.2 of 1.0 GiB free" and doctor.memory().works == NO


def test_no_gpu_is_no_fault(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(trial, "nvidia", lambda: False)
    assert trial.tried("gpu")["found"] == ""
    row = doctor.gpu(Outcome(""))
    assert (row.works, row.needed, row.mend) == (NOT_NEEDED, False, None)


@pytest.mark.parametrize(
    ("build", "hidden", "fault", "mend"),
    [
        (None, None, "this build of torch is for the CPU alone", "pip install --force-reinstall torch"),
        ("13.0", "", "CUDA_VISIBLE_DEVICES is ''", "unset CUDA_VISIBLE_DEVICES"),
        ("13.0", None, "Found no NVIDIA driver on your system.", "Install NVIDIA's driver"),
    ],
)
def test_a_gpu_that_torch_cannot_use_says_why(
    monkeypatch: pytest.MonkeyPatch, build: str | None, hidden: str | None, fault: str, mend: str
):
    def init() -> None:
        raise RuntimeError("Found no NVIDIA driver on your system. Please check.\nMore of it.")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.setattr(trial, "nvidia", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    outcome = trial.tried("gpu")
    assert str(outcome["fault"]).startswith(fault)
    assert str(outcome["mend"]).startswith(mend)
    row = doctor.gpu(Outcome(None, str(outcome["fault"]), outcome["mend"]))
    assert (row.works, row.needed) == (NO, False)


def test_a_gpu_is_found_on_its_bus_and_by_its_driver(tmp_path: Path):
    bus, driver = tmp_path / "devices", tmp_path / "gpus"
    for place, vendor, kind in (("a", "0x10de", "0x040300"), ("b", "0x8086", "0x030000")):  # its sound, another's GPU
        (bus / place).mkdir(parents=True)
        (bus / place / "vendor").write_text(f"{vendor}\n")
        (bus / place / "class").write_text(f"{kind}\n")
    assert not trial.nvidia(bus, driver)
    (bus / "b" / "vendor").write_text("0x10de\n")
    assert trial.nvidia(bus, driver)
    (driver / "0000:01:00.0").mkdir(parents=True)
    assert trial.nvidia(tmp_path / "none", driver)


@pytest.mark.parametrize(("flags", "clips"), [("sse4_1 avx2 avx", True), ("avx2 avx_vnni", False), ("", False)])
def test_how_8_bit_products_are_summed_is_said(monkeypatch: pytest.MonkeyPatch, flags: str, clips: bool):
    monkeypatch.setattr(machine, "_cpuinfo", lambda key: flags if key == "flags" else "")
    _, row = doctor.processor()
    assert ("which clips" in row.found) == clips
    assert row.found.startswith({"": "no instructions"}.get(flags, "avx"))
    assert row.works == YES


def test_processors_that_do_not_start_name_their_command(monkeypatch: pytest.MonkeyPatch):
    def probe(name: str) -> str:
        raise EdgekitError("arm64 does not start (Illegal instruction)", exit_code=4)

    assert trial.tried("processor:arm64")["fault"] == "not set up; --on arm64 needs it"
    monkeypatch.setattr(processors, "ready", lambda name: True)
    monkeypatch.setattr(processors, "probe", probe)
    outcome = trial.tried("processor:arm64")
    assert outcome["fault"] == "arm64 does not start (Illegal instruction)"
    assert "python -m edgekit.processors arm64" in str(outcome["mend"])


def test_data_that_recipes_name_and_that_is_not_here_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path))
    digits, cifar = doctor.datasets(Outcome("1,797 images"))
    assert (digits.works, digits.needed, cifar.what, cifar.works, cifar.needed) == (
        YES, True, "cifar10", NOT_NEEDED, False,
    )  # fmt: skip
    (tmp_path / "downloads" / "cifar-10-batches-py").mkdir(parents=True)
    assert doctor.datasets(Outcome(""))[1].works == YES


@pytest.mark.parametrize(
    ("broken", "works"),
    [
        (["package:scipy"], False),
        (["format:torchscript"], False),
        (["digits"], False),
        (["gpu", "processor:arm64", "processor:wasm"], True),
    ],
)
def test_only_what_the_three_verbs_need_decides_and_every_fault_has_its_mend(
    monkeypatch: pytest.MonkeyPatch, broken: list[str], works: bool
):
    monkeypatch.setattr(machine, "memory", lambda: (2**34, 2**33))

    def ask(lists: list[list[str]]) -> dict[str, Outcome]:
        return fine(lists) | {word: Outcome(None, "it ends its process (SIGSEGV)") for word in broken}

    monkeypatch.setattr(doctor, "ask", ask)
    document = doctor.examine()
    jsonschema.validate(document, SCHEMA)
    assert document["works"] == works
    faults = [row for row in document["rows"] if row["works"] == NO]
    assert len(faults) == len(broken)
    assert all(row["mend"] for row in faults)


def test_ctrl_c_ends_what_is_being_tried(tmp_path: Path):
    code = f"""
        import os, time
        from pathlib import Path
        Path({str(tmp_path)!r}, f"pid-{{os.getpid()}}").touch()
        time.sleep(1000)
    """
    path = os.pathsep.join([str(module(tmp_path, "torch", code)), str(ROOT)])
    asked = subprocess.Popen(
        [sys.executable, "-m", "edgekit", "doctor"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=interruptible,
    )
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("pid-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    asked.send_signal(signal.SIGINT)
    said, complaints = asked.communicate(timeout=30)
    assert (asked.returncode, said) == (130, "")
    assert "Traceback" not in complaints
    for pid in (path.name.removeprefix("pid-") for path in tmp_path.glob("pid-*")):
        stat = Path(f"/proc/{pid}/stat")
        assert not stat.exists() or stat.read_text().split()[2] == "Z"
