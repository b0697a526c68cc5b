"""Which files are measured, and which robust accuracies may be set side by side."""

import os
from pathlib import Path

import pytest
from benched import artifact, judge, plain, run
from onnx.helper import make_node

from edgekit.errors import EdgekitError
from edgekit.files import sha256
from edgekit.lineup import Setting, contenders, judged


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def names(*what: str) -> list[str]:
    return [one.name for one in contenders(what)]


def test_runs_artifacts_and_files_in_the_order_in_which_they_were_named():
    run(Path("runs/a"), "onnx-fp32", "onnx-int8", "torchscript-fp32")
    run(Path("runs/b"), "onnx-fp32")
    Path("runs/latest").symlink_to("b")
    artifact(Path("kept/onnx-int8"), 5)
    plain(Path("plain.onnx"))
    assert names() == names("runs/latest") == names("runs/b") == ["onnx-fp32"]
    assert names("runs/a") == ["onnx-fp32", "onnx-int8", "torchscript-fp32"]
    assert names("runs/a/artifacts/onnx-int8", "runs/a") == ["onnx-int8", "onnx-fp32", "torchscript-fp32"]  # once each
    assert names("runs/a/artifacts/onnx-int8/model.onnx", "plain.onnx") == ["onnx-int8", "plain.onnx"]
    assert names("runs/b", "runs/a/artifacts/onnx-int8") == ["b/onnx-fp32", "a/onnx-int8"]
    assert names("runs/a/artifacts/onnx-int8", "kept/onnx-int8") == ["a/onnx-int8", "kept/onnx-int8/model.onnx"]
    inside, own, alone = contenders(["runs/a/artifacts/onnx-int8", "kept/onnx-int8", "plain.onnx"])
    assert inside.run is not None and inside.run.folder == Path("runs/a")
    assert inside.within == "artifacts/onnx-int8/model.onnx"
    assert own.run is None and alone.run is None
    assert (inside.shape, alone.shape, alone.precision) == ((3, 8, 8), (3, 8, 8), "fp32")
    assert alone.sha256 == sha256(Path("plain.onnx")) and alone.bytes == Path("plain.onnx").stat().st_size


def test_what_cannot_be_measured_is_one_sentence():
    made = run(Path("runs/a"), "onnx-fp32", "torchscript-fp32") / "artifacts"
    run(Path("runs/empty"))
    (made / "torchscript-fp32/model.pt").rename("alone.pt")
    Path("bad.onnx").write_bytes(b"no model")
    plain(Path("any.onnx"), [make_node("Flatten", ["x"], ["y"])], sized=False)
    for what, words in {
        "nowhere": "nowhere: there is no such run",
        "runs/empty": "no exported file yet. Run: edgekit export runs/empty --int8",
        "runs": "not a run folder",
        "alone.pt": "alone.pt: is no ONNX file and no artifact. Name an artifact's folder",
        "bad.onnx": "not an ONNX model",
        "any.onnx": "'x' is \\? x 3 x 8 x \\?: images of which size is not said",
        "runs/a": "model.pt: the file is missing",
    }.items():
        with pytest.raises(EdgekitError, match=words) as caught:
            contenders([what])
        assert caught.value.exit_code == 2
    with (made / "onnx-fp32/model.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(EdgekitError, match="has changed since it was exported"):
        contenders([made / "onnx-fp32"])


def test_the_newest_verdict_on_this_very_file_counts():
    folder = run(Path("runs/a"), "onnx-fp32", "onnx-int8")
    for count in (120, 110, 100):
        for _ in range(3):  # up to 9: that 10 is newer than 9 only a number knows
            judge(folder / "verdicts", folder / "artifacts/onnx-fp32/model.onnx", count)
    newest = judge(folder / "verdicts", folder / "artifacts/onnx-fp32/model.onnx", 90)
    (folder / "verdicts/11").mkdir()
    (folder / "verdicts/11/verdict.json").write_text("{damaged")
    (first, second), setting = judged(contenders(["runs/a"]))
    assert first is not None and (first.accuracy.value, first.path, first.setting.samples) == (90 / 200, newest, 200)
    assert first.against is None and second is None
    assert setting == Setting(("pgd20",), "Linf", 8 / 255, False, "1" * 64, 200, 0, ())
    artifact_of_other_bytes = artifact(Path("runs/a/artifacts/onnx-int8-new"), 3)
    assert judged(contenders([artifact_of_other_bytes]))[0] == [None]


def test_accuracies_under_other_attacks_or_on_other_data_are_not_compared():
    made = run(Path("runs/a"), "onnx-fp32", "onnx-int8", "onnx-int8-x", "onnx-int8-y") / "artifacts"
    files = [made / name / "model.onnx" for name in ("onnx-fp32", "onnx-int8", "onnx-int8-x", "onnx-int8-y")]
    verdicts = made.parent / "verdicts"
    judge(verdicts, files[0], 100)
    judge(verdicts, files[0], 180, attacks=["fgsm"])  # newer, but under what the others were not judged under
    judge(verdicts, files[1], 90, passed=False)
    judge(verdicts, files[2], 150, attacks=["square500"])
    judge(verdicts, files[2], 160, epsilon=2 / 255)
    judge(verdicts, files[2], 170, attacks=["square500"])
    judge(verdicts, files[3], 160, data="2")
    found, setting = judged(contenders(["runs/a"]))
    assert setting is not None and setting.attacks == ("pgd20",)
    assert [(one.accuracy.value, one.against) for one in found if one] == [
        (0.5, None),
        (0.45, "the check steps_increase_loss failed"),
        (0.85, "other attacks"),
        (0.8, "other data"),
    ]


def test_accuracies_on_other_samples_grids_or_processors_are_not_compared():
    others = [{"grid": True}, {"of": 100}, {"seed": 1}, {"on": ["native", "arm64", "exact"]}]
    names = ["onnx-fp32", *(f"onnx-int8-{number}" for number in range(len(others)))]
    made = run(Path("runs/a"), *names)
    for name, other in zip(names, [{}, *others], strict=True):
        judge(made / "verdicts", made / "artifacts" / name / "model.onnx", 90, **other)
    judge(made / "verdicts", made / "artifacts/onnx-fp32/model.onnx", 100)  # the newest
    found, _ = judged(contenders(["runs/a"]))
    assert [one.against for one in found if one] == [
        None,
        "other attacks",
        "other samples",
        "other samples",
        "other processors",
    ]


def test_where_as_many_were_judged_under_each_the_newest_setting_counts():
    made = run(Path("runs/a"), "onnx-fp32") / "artifacts/onnx-fp32/model.onnx"
    later = judge(Path("runs/a/verdicts"), made, 100, attacks=["square500"])
    other = judge(Path("runs/a/verdicts"), made, 120, attacks=["pgd20"])
    for age, attack in ((50, "square500"), (-50, "pgd20")):
        os.utime(later, (other.stat().st_mtime + age,) * 2)
        _, setting = judged(contenders(["runs/a"]))
        assert setting is not None and setting.attacks == (attack,)


def test_a_file_of_no_run_has_its_verdicts_in_the_working_folder():
    path = plain(Path("plain.onnx"))
    judge(Path("edgekit-verdicts"), path, 100)
    (found,), _ = judged(contenders([path]))
    assert found is not None and found.accuracy.value == 0.5
