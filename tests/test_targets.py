"""Target profiles: read strictly, found here first, and exported with a budget that is checked."""

import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from commandline import command
from test_exporter import make

import edgekit
from edgekit import artifact, jobs, machine, runs, target
from edgekit.errors import EdgekitError
from edgekit.exporter import export
from edgekit.quantize import SCHEMES

PLACES = [
    *("android-litert", "android-xnnpack", "browser", "intel-edge"),
    *("iphone-coreml", "jetson-orin", "nvidia-server", "raspberry-pi-5"),
]
PROFILE = """
place = "a desk"
format = "onnx"
precision = "int8"
scheme = "x86"
runtime = "onnxruntime>=1.20"

[budget]
megabytes = 1
milliseconds = 1000
"""
TESTS = str(Path(__file__).parent)  # where the small student's factory stands
SCHEMAS = Path(edgekit.__file__).parent / "schemas"


def profile(name: str, *changes: tuple[str, str]) -> str:
    """Write export/NAME.toml in the working directory."""
    text = PROFILE
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    Path("export").mkdir(exist_ok=True)
    Path(f"export/{name}.toml").write_text(text)
    return name


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    make(folder / "runs/small-1")
    (folder / "runs/latest").symlink_to("small-1")
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(place: Path, here: Path) -> Iterator[runs.Run]:
    shutil.copytree(place / "runs", here / "runs", symlinks=True)
    yield runs.Run(Path("runs/small-1"))


def test_what_ships_is_valid_and_fits_the_formats_that_are_written(here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jobs, "find_spec", lambda package: package)
    document = target.document()
    jsonschema.validate(document, json.loads((SCHEMAS / "targets.json").read_text()))
    assert [one["name"] for one in document["targets"]] == PLACES
    for one in document["targets"]:
        (job,) = jobs.aimed(one["name"], False, False, "a", full=False)
        assert job.name == f"{one['format']}-{one['precision']}-{one['name']}-a"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("runtime", "runtme"), "line 6: the target has no key 'runtme'. Did you mean 'runtime'?"),
        (("megabytes", "megabites"), "line 9: [budget] has no key 'megabites'. Did you mean 'megabytes'?"),
        (("= 1000", '= "1000"'), "line 10: [budget]: 'milliseconds' should be a valid number, not '1000'"),
        (("= 1\n", "= 0\n"), "line 9: [budget]: 'megabytes' should be greater than 0, not 0"),
        (("megabytes = 1\n", ""), "line 8: [budget] needs the key 'megabytes'. It has no default"),
        (("int8", "int4"), "line 4: the target: 'precision' should be 'fp32', 'fp16' or 'int8', not 'int4'"),
        (("onnxruntime>=1.20", "ONNX Runtime"), "line 6: the target: 'runtime'"),
        (("int8", "fp32"), "should have the key 'scheme' where its precision is int8, and only there"),
        (("place =", 'name = "a"\nplace ='), "the target has no key 'name'. It is named as its file is"),
        (("[budget]", "[budget"), "not valid TOML"),
        (("milliseconds", 'machine = "mine"\nmilliseconds'), "[budget]: 'machine' should be 'device', 'x86', 'intel'"),
    ],
)
def test_a_fault_is_one_sentence_with_its_place(here: Path, change: tuple[str, str], sentence: str):
    with pytest.raises(EdgekitError) as caught:
        target.read(profile("desk", change))
    assert str(caught.value).startswith("export/desk.toml") and sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_profile_is_found_here_first_then_as_shipped_and_as_a_path(here: Path):
    shipped = target.read("browser")
    assert shipped.budget.megabytes == 5
    profile("browser")
    (here / "else").mkdir()
    (here / "else/where.toml").write_text(PROFILE)
    assert target.read("browser").place == "a desk"
    assert [one.place for one in target.listed() if one.name == "browser"] == ["a desk"]
    assert target.read("else/where.toml").name == "where"
    for name, sentence in {
        "brwser": "--target brwser: there is no target 'brwser'. Did you mean 'browser'?",
        "else/there.toml": "else/there.toml: there is no such file",
    }.items():
        with pytest.raises(EdgekitError) as caught:
            target.read(name)
        assert str(caught.value).startswith(sentence)
    (here / "else/a b.toml").write_text(PROFILE)
    with pytest.raises(EdgekitError, match="'name'"):
        target.read("else/a b.toml")


def test_what_a_profile_asks_of_its_format_must_be_what_it_writes(here: Path):
    for change, sentence in {
        ("x86", "signed"): "int8 files of onnx are in the scheme 'x86', not 'signed'",
        ("scheme", 'layout = "NHWC"\nscheme'): "files of onnx take NCHW, not NHWC",
        ('"onnx"', '"onx"'): "there is no format 'onx'. Did you mean 'onnx'?",
        ('"onnx"', '"torchscript"'): "torchscript is not written in int8 by this version",
    }.items():
        with pytest.raises(EdgekitError) as caught:
            jobs.aimed(profile("desk", change), False, False, None, full=False)
        assert str(caught.value).startswith("--target desk: ") and sentence in str(caught.value)
    assert {"x86", "signed", "symmetric"} <= set(SCHEMES)


def test_options_beside_a_target(here: Path):
    profile("desk")
    profile("plain", ('"int8"\nscheme = "x86"', '"fp32"'))
    made = jobs.aimed(["desk, plain", "desk"], True, False, "v1.2", full=True)
    assert [job.name for job in made] == ["onnx-fp32-v1.2", "onnx-int8-desk-v1.2", "onnx-fp32-plain-v1.2"]
    with pytest.raises(EdgekitError, match=r"--format: a target says its format itself. Leave out --format or --tar"):
        export(formats="onnx", targets="desk")
    with pytest.raises(EdgekitError, match=r"--int8: the targets say their precision themselves \(plain fp32\)"):
        export(int8=True, targets="plain")
    with pytest.raises(EdgekitError, match="--target: no target is named"):
        export(targets=" ,")
    with pytest.raises(EdgekitError, match="--sensitivity: is about an int8 file"):
        export(targets="plain", sensitivity=True)
    if jobs.find_spec("openvino"):
        profile("gateway", ('"onnx"', '"openvino"'))
        with pytest.raises(EdgekitError, match=r"--robust-drop: its tries .*\. Name targets whose format is onnx"):
            export(targets="gateway", robust_drop=0.01)
    (here / "desk.toml").write_text(PROFILE)
    with pytest.raises(EdgekitError, match=r"two profiles of one name would make one artifact \(onnx-int8-desk\)"):
        export(targets="desk,desk.toml")


def test_the_command_to_continue_names_the_targets():
    place, asked = runs.Run(Path("runs/a")), (False, "plain", False, None, True, False, (), None, "x", False)
    said = jobs.typed(place, *asked, targets=["desk", "plain"])
    assert said == "edgekit export runs/a --int8 --qat --ptq plain --target desk,plain --label x"


def test_an_export_for_a_target_records_it_and_its_budget(run: runs.Run, capsys: pytest.CaptureFixture[str]):
    profile("desk")
    document = export(targets="desk", ptq="plain")
    assert document["within_budget"] and [one["name"] for one in document["artifacts"]] == ["onnx-int8-desk"]
    written = artifact.load(run.artifacts / "onnx-int8-desk")
    jsonschema.validate(written.record, json.loads((SCHEMAS / "artifact.json").read_text()))
    about = written.record["target"]
    assert about["profile"] == target.read("desk").record()
    assert about["size"] == {"limit": 10**6, "bytes": (written.folder / "model.onnx").stat().st_size, "held": True}
    assert set(about["latency"]) == {"limit", "why"}  # no figure of this machine stands for the device's
    said = capsys.readouterr().err
    assert "is not checked here: it is measured by the runner on the device" in said
    # Again: nothing is written; another budget is another target, which --force takes.
    before = (written.folder / "artifact.json").read_bytes()
    assert not export(targets=["desk"], ptq="plain")["artifacts"][0]["written"]
    assert (written.folder / "artifact.json").read_bytes() == before
    profile("desk", ("megabytes = 1\n", "megabytes = 2\n"))
    with pytest.raises(EdgekitError, match="another artifact has this name"):
        export(targets="desk", ptq="plain")
    # A plain export under the same name is no target's.
    with pytest.raises(EdgekitError, match="another artifact has this name"):
        shutil.copytree(written.folder, run.artifacts / "onnx-fp32-desk")
        export(formats="onnx", label="desk")


def test_a_missed_size_fails_with_the_figure_and_leaves_the_files(run: runs.Run):
    profile("tight", ("megabytes = 1\n", "megabytes = 0.001\n"))
    for _ in range(2):  # what is there already is no less too large
        options = ("--target", "tight", "--ptq", "plain", "--json")
        done = command("export", *options, cwd=Path.cwd(), PYTHONPATH=os.pathsep.join([TESTS, *sys.path]))
        assert done.returncode == 1
        size = json.loads(done.stdout)["artifacts"][0]["target"]["size"]
        assert size["limit"] == 1000 < size["bytes"] and not size["held"]
        assert f"{size['bytes'] / 1e6:.3g} MB, MISSED: more than the budget of tight, 0.001 MB" in done.stderr
    assert artifact.load(run.artifacts / "onnx-int8-tight").bytes == size["bytes"]


def desk(name: str, milliseconds: float, **more: Any) -> target.Target:
    budget = {"megabytes": 1, "milliseconds": milliseconds, "machine": name}
    about = {"name": "desk", "place": "a desk", "format": "onnx", "precision": "fp32", "runtime": "onnxruntime>=1.20"}
    return target.Target.model_validate(about | {"budget": budget} | more)


def test_a_latency_is_measured_only_on_a_machine_like_the_targets(monkeypatch: pytest.MonkeyPatch):
    asked: list[float] = []

    def infer() -> None:
        begin = time.perf_counter()
        time.sleep(0.002)
        asked.append(time.perf_counter() - begin)

    monkeypatch.setattr(machine, "family", lambda: "x86")
    monkeypatch.setattr(machine, "vendor", lambda: "AuthenticAMD")
    monkeypatch.setattr(machine, "processor", lambda: "AMD Ryzen")
    for unlike in (desk("device", 1), desk("intel", 1), desk("x86", 1, threads=machine.cores() + 1)):
        record = target.measure(unlike, 10, infer)
        assert not asked and set(record["latency"]) == {"limit", "why"} and target.held(record)
    missed = target.measure(desk("x86", 1), 10, infer)
    taken = statistics.median(asked[5:])
    assert missed["latency"]["seconds"] == pytest.approx(taken, rel=0.1) and missed["latency"]["on"] == "AMD Ryzen"
    assert not target.held(missed) and any("MISSED: more than" in line for line in target.sentences(missed))
    kept = target.measure(desk("x86", 1000), 10, infer)
    assert target.held(kept) and not any("MISSED" in line for line in target.sentences(kept))
    # Emulated processors: Apple's, and QEMU's own.
    for vendor, name in (("VirtualApple", "VirtualApple @ 2.50GHz"), ("AuthenticAMD", "QEMU TCG CPU version 2.5+")):
        monkeypatch.setattr(machine, "vendor", lambda vendor=vendor: vendor)
        monkeypatch.setattr(machine, "processor", lambda name=name: name)
        assert "why" in target.measure(desk("x86", 1), 10, infer)["latency"]


def test_another_version_of_the_runtime_is_said(monkeypatch: pytest.MonkeyPatch):
    for asked, differs in {">=1.9": False, ">=1.32": False, ">=1.33": True, "==1.32": False, "==1.3": True}.items():
        monkeypatch.setattr(target.importlib.metadata, "version", lambda name: "1.32.0+cu130")
        lines = list(target.sentences(target.measure(desk("device", 1, runtime=f"onnxruntime{asked}"), 1, int)))
        assert any("in version 1.32.0+cu130, which is not the target's" in line for line in lines) == differs


def test_openvino_on_its_own_machine_is_measured(run: runs.Run, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("openvino")
    monkeypatch.setattr(machine, "family", lambda: "x86")
    monkeypatch.setattr(machine, "vendor", lambda: "GenuineIntel")
    changes = (('"onnx"', '"openvino"'), ("onnxruntime>=1.20", "openvino>=2026.1"), ("mega", 'machine = "intel"\nmega'))
    (one,) = export(targets=profile("gateway", *changes), ptq="plain")["artifacts"]
    latency = one["target"]["latency"]
    assert 0 < latency["seconds"] < 1 and latency["held"]
    # The graph for gradients beside it does not ship.
    folder = run.artifacts / "openvino-int8-gateway"
    assert one["target"]["size"]["bytes"] == sum((folder / f"model.{end}").stat().st_size for end in ("xml", "bin"))


def test_targets_are_listed(here: Path):
    profile("mine")
    done = command("targets", cwd=here)
    assert done.returncode == 0
    table = [line.split() for line in done.stdout.splitlines()]
    assert [row[0] for row in table[2:]] == sorted([*PLACES, "mine"])
    assert next(row for row in table if row[0] == "mine")[1:4] == ["a", "desk", "onnx-int8"]
    done = command("targets", "--json", cwd=here)
    assert json.loads(done.stdout) == json.loads(json.dumps(target.document()))
