"""A file against an earlier release: the figures against brute force, then the command with good and bad input."""

import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from commandline import command
from statsmodels.stats.contingency_tables import mcnemar

import edgekit
from edgekit.errors import EdgekitError
from edgekit.statistics import tango
from edgekit.verdict import AttackResult, Check, Rules, Versus, from_dict, judged, to_dict, versus
from edgekit.verifier import verify

SCHEMA = Path(edgekit.__file__).parent / "schemas" / "verdict.json"
ABOUT = {"name": "onnx-int8", "sha256": "3" * 64, "edgekit": "0.0.9"}


def right(count: int, n: int = 1000) -> Any:
    return np.arange(n) < count


def against(earlier: tuple[int, int], now: tuple[int, int], rules: Rules | None = None, **more: Any) -> Versus:
    return versus(
        rules or Rules(), (right(earlier[0]), right(earlier[1])), (right(now[0]), right(now[1])), **ABOUT, **more
    )


def file(baseline: Versus | None, student: bool = True, rules: Rules | None = None, **more: Any) -> Any:
    beside = {"float_clean_right": right(600), "float_robust_right": right(400)} if student else {}
    given = {"format": "onnx", "precision": "int8", "file": "model.onnx", "bytes": 1, "sha256": "0" * 64}
    attacks = [AttackResult("pgd20", 0.4, {"float": 0.4}, 1.0)]
    given |= {"name": "onnx-int8", "attacks": attacks, "judged_on": "here", "baseline": baseline}
    return judged(rules or Rules(), right(600), right(400), **(given | beside | more))


def test_the_figures_are_those_of_the_paired_table() -> None:
    generator = np.random.default_rng(0)
    before_clean, clean = generator.random(500) < 0.8, generator.random(500) < 0.75
    before, now = generator.random(500) < 0.5, generator.random(500) < 0.45
    one = versus(Rules(), (before_clean, before), (clean, now), **ABOUT)
    for since, first, second in (
        (one.clean, before_clean, clean),
        (one.robust, before_clean & before, clean & now),  # what is wrong when clean is not robust
    ):
        table = [[sum((first == a) & (second == b)) for b in (True, False)] for a in (True, False)]
        assert (since.only_baseline, since.only_artifact) == (table[0][1], table[1][0])
        assert since.value == pytest.approx(second.mean() - first.mean())
        assert since.p_value == pytest.approx(mcnemar(table, exact=True).pvalue)
        assert (since.low, since.high) == tango(table[0][1], table[1][0], 500)
    assert one.robust_accuracy.value == (before_clean & before).mean()


@pytest.mark.parametrize(
    ("earlier", "now", "expected"),
    [
        ((600, 400), (600, 400), "survived"),
        ((600, 400), (600, 396), "survived"),
        ((600, 400), (600, 385), "inconclusive"),
        ((600, 400), (600, 350), "lost"),
        ((600, 400), (550, 400), "lost"),  # of clean accuracy
        ((600, 350), (600, 400), "survived"),  # a gain is no loss
        ((600, 25), (600, 25), "inconclusive"),  # nothing to lose
    ],
)
def test_the_rules_are_those_against_the_student(earlier, now, expected) -> None:
    one = against(earlier, now)
    assert one.verdict == expected
    assert "baseline" in one.why


def test_each_tolerance_belongs_to_its_accuracy() -> None:
    assert against((600, 400), (600, 350), Rules(tolerance=0.08)).verdict == "survived"
    assert against((600, 400), (550, 400), Rules(clean_tolerance=0.08)).verdict == "survived"
    assert against((600, 400), (600, 350), Rules(clean_tolerance=0.08)).verdict == "lost"


def test_what_faced_other_sources_is_not_said_to_have_lost_robustness() -> None:
    doubted = against((600, 400), (600, 350), doubt="other sources")
    assert (doubted.verdict, "other sources" in doubted.why) == ("inconclusive", True)
    assert against((600, 400), (550, 350), doubt="other sources").verdict == "lost"  # clean accuracy faced none


def test_a_loss_against_the_baseline_is_a_loss_and_what_is_open_there_is_not() -> None:
    lost = against((600, 460), (600, 400))
    assert lost.verdict == "lost"
    assert file(lost).verdict == "lost"
    assert "against the baseline" in file(lost).why
    still_open = against((600, 415), (600, 400))
    assert still_open.verdict == "inconclusive"
    assert file(still_open).verdict == "survived"  # it survived against its own student
    assert file(None).verdict == "survived"


def test_with_nothing_else_to_hold_it_against_the_baseline_decides() -> None:
    for earlier, expected in [((600, 400), "survived"), ((600, 415), "inconclusive"), ((600, 460), "lost")]:
        assert file(against(earlier, (600, 400)), student=False).verdict == expected
    floor = Rules(at_least=0.3)
    assert file(against((600, 415), (600, 400)), student=False, rules=floor).verdict == "survived"
    assert file(against((600, 460), (600, 400)), student=False, rules=floor).verdict == "lost"
    assert file(None, student=False).verdict == "measured"


def test_a_doubtful_attack_takes_back_what_it_showed_and_not_a_clean_loss() -> None:
    failed = [Check("steps_increase_loss", False, 0.1, "it did not rise")]
    assert file(against((600, 460), (600, 400)), checks=failed).verdict == "inconclusive"
    assert file(against((680, 400), (600, 400)), checks=failed).verdict == "lost"


# From here on the command; each test works on a copy of the run with a first verdict.


@pytest.fixture(scope="module")
def released(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("released")
    shutil.copytree(workplace / "runs", place / "runs", symlinks=True)
    for name in ("onnx-fp32", "torchscript-fp32"):
        shutil.rmtree(place / "runs/tiny-1/artifacts" / name)
    done = command("verify", "--attack", "fgsm", "--samples", "300", "--tolerance", "4", "--json", cwd=place)
    assert (place / "runs/tiny-1/verdicts/1/samples.jsonl").is_file(), done.stderr
    return place


@pytest.fixture
def place(released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(released / "runs", tmp_path / "runs", symlinks=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


VERDICT = Path("runs/tiny-1/verdicts/1/verdict.json")
SAMPLES = VERDICT.with_name("samples.jsonl")


def better(count: int) -> None:
    """Rewrite the first verdict as if its file had withstood so many more of the samples."""
    lines = [json.loads(line) for line in SAMPLES.read_text().splitlines()]
    for line in [line for line in lines if not line["file_clean"]][:count]:
        line |= {"file_clean": True, "file_robust": True}
    document = json.loads(VERDICT.read_text())
    for column, key in (("file_clean", "clean_accuracy"), ("file_robust", "robust_accuracy")):
        document["artifacts"][0][key]["value"] = sum(line[column] for line in lines) / len(lines)
    VERDICT.write_text(json.dumps(document))
    SAMPLES.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_same_file_has_not_changed(place: Path) -> None:
    copies = ["--markdown", "v.md", "--junit", "v.xml"]
    arguments = ["--attack", "fgsm", "--samples", "300", "--tolerance", "4", "--baseline", VERDICT]
    done = command("verify", *arguments, *copies, "--json", cwd=place)
    assert done.returncode in (0, 3), done.stderr  # the file against its student is another matter
    document = json.loads(done.stdout)
    jsonschema.validate(document, json.loads(SCHEMA.read_text()))
    (one,) = document["artifacts"]
    versus = one["baseline"]
    assert (versus["name"], versus["sha256"], versus["edgekit"]) == (one["name"], one["sha256"], document["edgekit"])
    for kind in ("clean", "robust"):
        since = versus[kind]
        assert (since["value"], since["only_baseline"], since["only_artifact"], since["p_value"]) == (0, 0, 0, 1)
        assert (since["low"], since["high"]) == tango(0, 0, 300)
    assert versus["verdict"] == "survived"
    assert to_dict(from_dict(document)) == document
    said = (place / "v.md").read_text()
    assert "since baseline, points" in said
    assert said.count("against onnx-int8 of the baseline") == 1
    assert "against onnx-int8 of the baseline" in (place / "v.xml").read_text()
    page = (place / "runs/tiny-1/verdicts/2/report.html").read_text()
    assert "Since the baseline, points" in page
    assert "against onnx-int8 of the baseline" in page


def test_a_release_that_is_worse_than_the_last_one_has_lost(place: Path) -> None:
    better(60)
    arguments = ["--attack", "fgsm", "--samples", "300", "--tolerance", "4", "--baseline", VERDICT]
    done = command("verify", *arguments, cwd=place)
    assert done.returncode == 1, done.stderr
    assert "robust since" in done.stdout
    assert "-20.0" in done.stdout
    assert "LOST" in done.stdout
    document = json.loads((place / "runs/tiny-1/verdicts/2/verdict.json").read_text())
    since = document["artifacts"][0]["baseline"]["robust"]
    assert (since["only_baseline"], since["only_artifact"]) == (60, 0)
    assert (since["low"], since["high"]) == tango(60, 0, 300)


def test_an_earlier_file_that_was_attacked_without_its_twin_shows_no_loss(place: Path) -> None:
    better(100)
    rewritten(lambda one: one["artifacts"][0]["attacks"][0]["sources"].pop("twin"))()
    document = verify(attack="fgsm", samples=300, baseline=VERDICT, tolerance=0.2, clean_tolerance=0.5)
    since = document["artifacts"][0]["baseline"]
    assert since["robust"]["high"] < -0.2
    assert since["verdict"] == "inconclusive"
    assert "other sources: float then, float, twin now" in since["why"]
    # Of its own it survives, unless a check flags FGSM, which is one step; the baseline changes nothing.
    assert document["verdict"] == "survived" or document["artifacts"][0]["why"].startswith("the check ")


def test_looks_are_paired_with_a_baseline_that_holds_all_their_samples(place: Path) -> None:
    better(150)
    document = verify(attack="fgsm", samples=300, until_decided=True, baseline=VERDICT, tolerance=0.04)
    (one,) = document["artifacts"]
    count = one["plan"]["samples"][one["plan"]["look"] - 1]
    assert one["verdict"] == "lost"
    assert count < 300
    since = one["baseline"]["robust"]
    own = [json.loads(line) for line in Path("runs/tiny-1/verdicts/2/samples.jsonl").read_text().splitlines()]
    before = {line["index"]: line for line in map(json.loads, SAMPLES.read_text().splitlines())}
    assert len(own) == count
    only_there = sum(before[line["index"]]["file_robust"] and not line["file_robust"] for line in own)
    assert since["only_baseline"] == only_there
    assert (since["low"], since["high"]) == tango(only_there, since["only_artifact"], count, one["plan"]["confidence"])
    with pytest.raises(EdgekitError, match="is none of them"):  # the other way round the samples do not suffice
        verify(attack="fgsm", samples=count, baseline="runs/tiny-1/verdicts/2/verdict.json", seed=0)


def rewritten(change: Any) -> Any:
    def spoil() -> None:
        document = json.loads(VERDICT.read_text())
        change(document)
        VERDICT.write_text(json.dumps(document))

    return spoil


ON_ARM = [{"processor": "arm64", "runtime": "x", "verdict": "survived", "why": "x"}]


def cut() -> None:
    SAMPLES.write_text("\n".join(SAMPLES.read_text().splitlines()[:-1]))


def flip() -> None:
    text = SAMPLES.read_text()
    SAMPLES.write_text(text.replace('"file_robust": true', '"file_robust": false', 1))


def other_label() -> None:
    first, _, rest = SAMPLES.read_text().partition("\n")
    line = json.loads(first)
    line["label"] = 9 - line["label"] if line["label"] != 4.5 else 0
    SAMPLES.write_text(json.dumps(line) + "\n" + rest)


@pytest.mark.parametrize(
    ("spoil", "options", "said"),
    [
        (lambda: None, {"samples": 200}, "the number of samples differs: 300 there, 200 here"),
        (lambda: None, {"seed": 1}, "the seed differs: 0 there, 1 here"),
        (lambda: None, {"attack": "fgsm,pgd3"}, "the attacks differ: fgsm there, fgsm, pgd3 here"),
        (lambda: None, {"epsilon": "8/255"}, "epsilon differs"),
        (lambda: None, {"grid": True}, "what --grid asks for differs: any values there, uint8 values here"),
        (lambda: None, {"norm": "L2", "epsilon": "0.5", "attack": "pgd3"}, "differ"),
        (lambda: None, {"baseline": "no.json"}, "there is no such verdict"),
        (lambda: None, {"baseline": "runs"}, "a folder, not a verdict.json"),
        (lambda: None, {"baseline": "runs/tiny-1/student.safetensors"}, "not a verdict.json"),
        (lambda: None, {"baseline": "runs/tiny-1/run.json"}, "not a valid verdict.json: it has no verdict"),
        (lambda: VERDICT.write_text("{" * 100_000), {}, "not a verdict.json"),
        (lambda: VERDICT.write_text("[]"), {}, "not a verdict.json"),
        (rewritten(lambda one: one["data"].update(sha256="4" * 64)), {}, "the data differ: 444444444444 there"),
        (rewritten(lambda one: one["artifacts"][0].update(verdict="fine")), {}, "there is no verdict 'fine'"),
        (
            rewritten(lambda one: one["artifacts"][0].update(judged_on=ON_ARM)),
            {},
            "the processors of onnx-int8 differ: native, arm64 there, native here",
        ),
        (rewritten(lambda one: one.update(norm="L2")), {}, "the norm differs: L2 there, Linf here"),
        (lambda: SAMPLES.unlink(), {}, "no samples.jsonl lies beside it"),
        (lambda: SAMPLES.write_bytes(b"\xff\xfe"), {}, "damaged: it is no text"),
        (lambda: SAMPLES.write_text("{}\n"), {}, "line 1: damaged: this is no sample"),
        (lambda: SAMPLES.write_text('{"artifact": "x", "index": true, "label": 1}\n'), {}, "line 1: damaged"),
        (lambda: SAMPLES.write_text(SAMPLES.read_text() * 2), {}, "line 301: damaged: sample"),
        (lambda: SAMPLES.write_text(""), {}, "does not hold the samples of onnx-int8"),
        (cut, {}, "does not hold the samples of onnx-int8"),
        (flip, {}, "does not hold the samples of onnx-int8"),
        (other_label, {}, "is of another class there"),
    ],
)
def test_what_was_not_attacked_alike_is_refused_in_one_sentence(place: Path, spoil, options, said) -> None:
    spoil()
    before = sorted(place.rglob("*"))
    with pytest.raises(EdgekitError) as caught:
        verify(**({"attack": "fgsm", "samples": 300, "baseline": VERDICT} | options))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    assert sorted(place.rglob("*")) == before


def test_a_file_of_another_name_is_compared_only_where_there_is_one_on_either_side(place: Path) -> None:
    artifacts = place / "runs/tiny-1/artifacts"
    (artifacts / "onnx-int8").rename(artifacts / "onnx-int8-new")
    done = command("verify", "--attack", "fgsm", "--samples", "300", "--baseline", VERDICT, "--json", cwd=place)
    (one,) = json.loads(done.stdout)["artifacts"]
    assert (one["name"], one["baseline"]["name"]) == ("onnx-int8-new", "onnx-int8")
    shutil.copytree(artifacts / "onnx-int8-new", artifacts / "onnx-int8-too")
    done = command("verify", "--attack", "fgsm", "--samples", "300", "--baseline", VERDICT, cwd=place)
    assert done.returncode == 2
    assert "it judged none of these files (onnx-int8-new, onnx-int8-too), but onnx-int8" in done.stderr
    (artifacts / "onnx-int8-too").rename(artifacts / "onnx-int8")
    done = command("verify", "--attack", "fgsm", "--samples", "300", "--baseline", VERDICT, "--json", cwd=place)
    found = json.loads(done.stdout)["artifacts"]
    assert [(one["name"], "baseline" in one) for one in found] == [("onnx-int8", True), ("onnx-int8-new", False)]
    assert "onnx-int8-new: the baseline judged no file of that name" in done.stderr
