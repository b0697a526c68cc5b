import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import edgekit
from edgekit import statistics
from edgekit.errors import EdgekitError
from edgekit.verdict import (
    EXIT,
    WORST_FIRST,
    Accuracy,
    AttackResult,
    Change,
    Changes,
    Check,
    Data,
    FloatStudent,
    Machine,
    Rules,
    Twin,
    accuracy,
    compare,
    decide,
    from_dict,
    judged,
    not_run,
    summarize,
    to_dict,
    worst,
)

SCHEMAS = Path(edgekit.__file__).parent / "schemas"
ROBUST = Accuracy(0.5, 0.46, 0.54)
# The names and their order as CLI.md prints them.
TOP = "schema edgekit verdict passed attacks norm epsilon samples seed tolerance clean_tolerance confidence looks data"
TOP = [*TOP.split(), "machine", "float", "artifacts", "report", "grid"]  # the last is ours
FILE = "name format precision file bytes sha256 clean_accuracy robust_accuracy float_robust_accuracy attacks change"
FILE = [*FILE.split(), "agreement", "twin", "checks", "judged_on", "verdict", "why"]


def schema(name):
    return jsonschema.Draft202012Validator(json.loads((SCHEMAS / name).read_text(encoding="utf-8")))


def moved(low, high):
    return Change((low + high) / 2, low, high, 0.5, 3, 2)


UNMOVED = moved(-0.005, 0.005)


def right(n, count):
    return np.arange(n) < count


def paired_file(rules=None, robust=400, name="onnx-int8", **more):
    """A file on 1,000 samples: 600 right when clean, `robust` of them under attack; its student has 600 and 400."""
    given = {
        "format": "onnx",
        "precision": "int8",
        "file": "artifacts/onnx-int8/model.onnx",
        "bytes": 123,
        "sha256": "0" * 64,
        "attacks": [AttackResult("pgd20", robust / 1000, {"float": 0.4, "twin": 0.395}, 12.3)],
        "judged_on": "x86 avx2, onnxruntime 1.32.0",
        "float_clean_right": right(1000, 600),
        "float_robust_right": right(1000, 400),
        "agreement": 0.985,
        "twin": Twin(1.0, 0.0),
        "checks": [Check("steps_increase_loss", True, 0.97, "it rose in 97 % of the samples")],
    }
    return judged(rules or Rules(), right(1000, 600), right(1000, robust), name=name, **(given | more))


def unpaired_file(rules, robust=400):
    alone = {"float_clean_right": None, "float_robust_right": None, "agreement": None, "twin": None, "checks": []}
    return paired_file(rules, robust, **alone)


def document(*files, rules=None, **more):
    given = {
        "attacks": ["pgd20"],
        "norm": "Linf",
        "epsilon": 8 / 255,
        "samples": 1000,
        "seed": 0,
        "data": Data("digits", "test", "1" * 64),
        "machine": Machine("a cpu", "avx2", {"onnxruntime": "1.32.0"}),
    }
    return summarize(rules or Rules(), files, **(given | more))


def no_gpu(name="tensorrt-int8"):
    same = {"format": "tensorrt", "precision": "int8", "file": "model.engine", "bytes": 5, "sha256": "2" * 64}
    return not_run(name=name, why="there is no GPU here", command="edgekit verify model.engine", **same)


@pytest.mark.parametrize(
    ("robust", "clean", "expected"),
    [
        ((-0.02, 0.01), (-0.02, 0.0), "survived"),  # an end at the tolerance still holds
        ((-0.0200001, 0.01), (0.0, 0.01), "inconclusive"),
        ((0.0, 0.01), (-0.0200001, 0.01), "inconclusive"),
        ((-0.05, -0.02), (0.0, 0.01), "inconclusive"),  # lost asks for less than the tolerance, not for equal
        ((-0.05, -0.0200001), (0.0, 0.01), "lost"),
        ((0.0, 0.01), (-0.05, -0.0200001), "lost"),
        ((-0.5, 0.5), (-0.05, -0.03), "lost"),  # of either
        ((0.1, 0.2), (0.1, 0.2), "survived"),
    ],
)
def test_the_interval_decides_against_the_float_student(robust, clean, expected):
    change = Changes(clean=moved(*clean), robust=moved(*robust))
    verdict, why = decide(Rules(), ROBUST, float_robust_accuracy=ROBUST, change=change, samples=1000)
    assert verdict == expected
    assert why


def test_each_tolerance_belongs_to_its_accuracy():
    loss = Changes(clean=moved(-0.04, -0.03), robust=UNMOVED)
    assert decide(Rules(clean_tolerance=0.05), ROBUST, change=loss, samples=1000)[0] == "survived"
    assert decide(Rules(tolerance=0.05), ROBUST, change=loss, samples=1000)[0] == "lost"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.4, 0.6, "survived"), (0.39, 0.6, "inconclusive"), (0.1, 0.4, "inconclusive"), (0.1, 0.39, "lost")],
)
def test_without_a_student_the_floor_decides(low, high, expected):
    assert decide(Rules(at_least=0.4), Accuracy(0.4, low, high), samples=1000)[0] == expected
    assert decide(Rules(), Accuracy(0.4, low, high), samples=1000)[0] == "measured"


def test_with_a_student_and_a_floor_the_worse_counts():
    change = Changes(clean=UNMOVED, robust=UNMOVED)
    floors = {None: "survived", 0.3: "survived", 0.5: "inconclusive", 0.9: "lost"}
    for floor, expected in floors.items():
        assert decide(Rules(at_least=floor), ROBUST, change=change, samples=1000)[0] == expected


@pytest.mark.parametrize("robust", [UNMOVED, moved(-0.3, -0.1)])
def test_a_failed_check_makes_a_robust_accuracy_unbelievable(robust):
    failed = Check("gradients_alive", False, 0.0, "all gradients are zero")
    change = Changes(clean=UNMOVED, robust=robust)
    verdict, why = decide(Rules(), ROBUST, change=change, samples=1000, checks=[failed])
    assert verdict == "inconclusive"
    assert "gradients_alive" in why
    assert "all gradients are zero" in why
    assert decide(Rules(), ROBUST, samples=1000, checks=[failed])[0] == "inconclusive"
    assert decide(Rules(at_least=0.1), ROBUST, samples=1000, checks=[failed])[0] == "inconclusive"


def test_a_loss_of_clean_accuracy_needs_no_attack_and_stands():
    failed = Check("gradients_alive", False, 0.0, "all gradients are zero")
    change = Changes(clean=moved(-0.3, -0.1), robust=UNMOVED)
    verdict, why = decide(Rules(), ROBUST, change=change, samples=1000, checks=[failed])
    assert verdict == "lost"
    assert "gradients_alive" in why


@pytest.mark.parametrize(("low", "expected"), [(0.02, "inconclusive"), (0.0200001, "survived")])
def test_a_student_with_no_robustness_to_lose_cannot_survive(low, expected):
    student = Accuracy(0.03, low, 0.05)
    change = Changes(clean=UNMOVED, robust=UNMOVED)
    verdict, why = decide(Rules(), ROBUST, float_robust_accuracy=student, change=change, samples=1000)
    assert verdict == expected
    assert ("no robustness to lose" in why) == (expected == "inconclusive")


def test_data_that_cannot_decide_says_so():
    change = Changes(clean=UNMOVED, robust=UNMOVED)
    verdict = decide(Rules(), ROBUST, change=change, samples=1000, undecidable="every sample has the same class")
    assert verdict == ("inconclusive", "every sample has the same class")
    few = untouched(*np.ones((2, 50), dtype=bool))
    assert few.verdict == "inconclusive"
    assert "50 samples are too few" in few.why
    assert untouched(*np.ones((2, statistics.fewest(0.02)), dtype=bool)).verdict == "survived"


def untouched(clean, robust):
    """A file that does what its student does."""
    same = {"format": "onnx", "precision": "fp32", "file": "a", "bytes": 1, "sha256": "0" * 64, "attacks": []}
    float_student = {"float_clean_right": clean, "float_robust_right": robust}
    return judged(Rules(), clean, robust, name="a", judged_on="here", **same, **float_student)


def test_figures_come_from_what_each_sample_did():
    float_right = [True, True, True, False, False, True, True, True]
    file_right = [True, False, False, True, False, True, True, True]
    change = compare(float_right, file_right)
    assert (change.only_float, change.only_artifact, change.value) == (2, 1, -1 / 8)
    assert (change.low, change.high) == statistics.tango(2, 1, 8)
    assert change.p_value == statistics.mcnemar(2, 1)
    share = accuracy(file_right)
    assert (share.value, (share.low, share.high)) == (5 / 8, statistics.wilson(5, 8))


def test_a_sample_that_is_wrong_when_clean_is_not_robust():
    clean, robust = np.array([True, True, False, False] * 250), np.ones(1000, dtype=bool)
    file = untouched(clean, robust)
    assert file.robust_accuracy.value == file.float_robust_accuracy.value == 0.5


def test_torch_answers_are_taken_too():
    torch = pytest.importorskip("torch")
    answers = torch.tensor([True, False, True, True])
    assert accuracy(answers) == accuracy(answers.tolist())


@pytest.mark.parametrize("call", [lambda: accuracy([]), lambda: compare([True], [True, False])])
def test_no_samples_and_unpaired_samples_are_refused(call):
    with pytest.raises(EdgekitError):
        call()


@given(st.lists(st.sampled_from(WORST_FIRST), min_size=1))
def test_worst_is_the_first_of_the_contract_and_no_better_than_any(verdicts):
    order = ["lost", "inconclusive", "not_run", "measured", "survived"]
    assert order.index(worst(verdicts)) == min(order.index(name) for name in verdicts)


def test_worst_of_nothing_or_of_a_foreign_word_is_refused():
    for verdicts in ([], ["survived", "fine"]):
        with pytest.raises(EdgekitError):
            worst(verdicts)


def test_exit_codes_are_those_of_the_contract():
    assert EXIT == {"survived": 0, "measured": 0, "lost": 1, "inconclusive": 3, "not_run": 3}
    cases = [([400], 0, True), ([400, 200], 1, False), ([400, 385], 3, False)]
    for robusts, code, passed in cases:
        verdict = document(*(paired_file(robust=robust) for robust in robusts))
        assert (verdict.exit_code, verdict.passed) == (code, passed)


def test_a_file_that_cannot_run_fails_the_run_unless_it_may_be_skipped():
    ran, skipped = paired_file(), no_gpu()
    assert (document(ran, skipped).verdict, document(ran, skipped).exit_code) == ("not_run", 3)
    assert document(ran, skipped, skip_unavailable=True).exit_code == 0
    assert document(paired_file(robust=200), skipped, skip_unavailable=True).exit_code == 1
    assert not document(skipped, skip_unavailable=True).passed


def test_the_document_has_the_fields_of_the_contract_in_its_order():
    student = FloatStudent(accuracy(right(1000, 600)), accuracy(right(1000, 400)))
    written = to_dict(document(paired_file(), float_student=student, report="verdicts/1/report.html"))
    assert list(written) == TOP
    (file,) = written["artifacts"]
    assert list(file) == FILE
    assert list(file["change"]["robust"]) == ["value", "low", "high", "p_value", "only_float", "only_artifact"]
    assert list(file["change"]["clean"])[:3] == ["value", "low", "high"]
    assert list(file["attacks"][0]) == ["name", "robust_accuracy", "sources", "seconds"]
    assert list(file["checks"][0]) == ["name", "passed", "value", "why"]
    assert written["epsilon"] == 0.03137254901960784


def test_what_does_not_apply_is_absent():
    rules = Rules(at_least=0.3)
    written = to_dict(document(unpaired_file(rules), rules=rules))
    assert "float" not in written
    assert written["at_least"] == 0.3
    assert {"change", "float_robust_accuracy", "agreement", "twin"}.isdisjoint(written["artifacts"][0])
    absent = to_dict(document(no_gpu()))["artifacts"][0]
    assert {"clean_accuracy", "robust_accuracy", "judged_on"}.isdisjoint(absent)
    assert absent["command"] == "edgekit verify model.engine"


def documents():
    student = FloatStudent(accuracy(right(1000, 600)), accuracy(right(1000, 400)))
    rules = Rules(at_least=0.3)
    return [
        document(paired_file(), paired_file(robust=385), paired_file(robust=1), float_student=student, looks=2),
        document(unpaired_file(Rules())),
        document(unpaired_file(rules), rules=rules, report="verdicts/1/report.html"),
        document(no_gpu(), paired_file()),
    ]


@pytest.mark.parametrize("verdict", documents())
def test_the_document_survives_json_and_fits_its_schema(verdict):
    text = json.dumps(to_dict(verdict), allow_nan=False)
    assert from_dict(json.loads(text)) == verdict
    assert to_dict(from_dict(json.loads(text))) == to_dict(verdict)
    schema("verdict.json").validate(json.loads(text))


@pytest.mark.parametrize("verdict", documents())
def test_the_schema_knows_every_field(verdict):
    """Later fields are allowed, so a misspelt one would pass unseen: closed, the schema still has to fit."""

    def closed(part):
        if isinstance(part, dict):
            shut = {name: closed(item) for name, item in part.items()}
            return shut | ({"unevaluatedProperties": False} if part.get("type") == "object" else {})
        return [closed(item) for item in part] if isinstance(part, list) else part

    strict = closed(json.loads((SCHEMAS / "verdict.json").read_text(encoding="utf-8")))
    jsonschema.Draft202012Validator(strict).validate(to_dict(verdict))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda it: it.pop("looks"),
        lambda it: it.update(verdict="fine"),
        lambda it: it.update(epsilon="8/255"),
        lambda it: it.update(schema=2),
        lambda it: it["artifacts"][0].pop("why"),
        lambda it: it["artifacts"][0].update(verdict="good"),
        lambda it: it["artifacts"][0]["clean_accuracy"].update(low=True),
        lambda it: it["artifacts"][0]["change"].pop("robust"),
        lambda it: it["artifacts"][0]["change"]["robust"].pop("p_value"),
        lambda it: it["artifacts"][0].update(attacks={}),
        lambda it: it["artifacts"][0].update(judged_on=3),
    ],
)
def test_a_spoilt_document_is_refused_by_reader_and_schema(spoil):
    written = json.loads(json.dumps(to_dict(document(paired_file()))))
    spoil(written)
    if "looks" in written:  # the reader fills in what has a default, the schema asks for it
        with pytest.raises(EdgekitError):
            from_dict(written, where="verdict.json")
    assert not schema("verdict.json").is_valid(written)


@pytest.mark.parametrize("written", [None, [], 3, {}, {"schema": 1}])
def test_what_is_no_verdict_is_refused_in_one_sentence(written):
    with pytest.raises(EdgekitError, match=r"^a\.json: not a "):
        from_dict(written, where="a.json")


def test_fields_of_a_later_edgekit_are_passed_over():
    example = to_dict(document(paired_file()))
    example["artifacts"][0]["later"] = {"field": 1}
    assert to_dict(from_dict(example)) == to_dict(document(paired_file()))


def artifact_json(**changed):
    integers = {"bits": 8, "signed": True, "symmetric": True, "granularity": "channel"}
    return {
        "schema": 1,
        "edgekit": "0.1.0",
        "format": "onnx",
        "precision": "int8",
        "scheme": {"weights": integers, "activations": integers, "cannot_saturate": True},
        "files": [{"path": "model.onnx", "bytes": 123, "sha256": "0" * 64}],
        "input": {
            "shape": [None, 3, 32, 32],
            "layout": "NCHW",
            "range": [0, 1],
            "normalization": "inside",
            "resize": [32, 32],
            "crop": None,
        },
        "outputs": "logits",
        "classes": ["cat", "dog"],
        "made_from": {"run": "a-1", "seed": 0} | {f"{of}_sha256": "0" * 64 for of in ("student", "recipe", "data")},
        "calibration": {"images": 256, "sha256": "0" * 64, "method": "minmax"},
        "versions": {"onnx": "1.23.2"},
        "against_float": {"images": 100, "agreement": 0.98, "max_abs_difference": 0.1},
    } | changed


def test_the_artifact_schema_takes_the_contract_and_nothing_less():
    fits = schema("artifact.json").is_valid
    assert fits(artifact_json())
    outside = artifact_json()["input"] | {"normalization": {"mean": [0.5], "std": [0.25]}}
    assert fits(artifact_json(input=outside))
    full = artifact_json(precision="fp32")
    assert fits({name: value for name, value in full.items() if name not in ("scheme", "calibration")})
    int8 = artifact_json()
    for name in int8:
        assert not fits({other: value for other, value in int8.items() if other != name}), name
    assert not fits(artifact_json(files=[{"path": "../model.onnx", "bytes": 1, "sha256": "0" * 64}]))
    assert not fits(artifact_json(files=[{"path": "model.onnx", "bytes": 1, "sha256": "short"}]))


@pytest.mark.parametrize("name", ["verdict.json", "artifact.json"])
def test_the_schemas_are_schemas(name):
    jsonschema.Draft202012Validator.check_schema(schema(name).schema)


def test_importing_the_verdict_loads_nothing_heavy():
    heavy = "{'torch', 'numpy', 'scipy', 'onnx', 'onnxruntime', 'pydantic'}"
    code = f"import sys, edgekit.verdict; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
