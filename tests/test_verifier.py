"""The verdict on files: a linear student whose robust set is known exactly, then a real run and its real files."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from edgekit.attacks import parse
from edgekit.attacks.campaign import Outcome
from edgekit.checks import settle
from edgekit.classifier import Classifier, Wrapped
from edgekit.errors import EdgekitError
from edgekit.examine import Beside, Examined, Subject, Trial, examine, one_by_one_where_needed
from edgekit.randomness import derive
from edgekit.verdict import Rules, to_dict
from edgekit.verifier import verify

EPSILON = 0.03


def student_of(weight: Tensor, bias: Tensor) -> Wrapped:
    return Wrapped(lambda images: images.flatten(1) @ weight.T + bias, differentiable=True)


def as_file(student: Callable[[Tensor], Tensor]) -> Wrapped:
    return Wrapped(lambda images: student(images).detach(), differentiable=False)


@pytest.fixture(scope="module")
def trained() -> tuple[Tensor, Tensor]:
    """Weights (10, 64) and biases of a softmax regression on digits."""
    data = load_digits()
    images, labels = torch.from_numpy(data.data).float()[:1200] / 16, torch.from_numpy(data.target)[:1200]
    weight, bias = torch.zeros(10, 64, requires_grad=True), torch.zeros(10, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], 0.05)
    for _ in range(80):
        optimizer.zero_grad()
        (nn.functional.cross_entropy(images @ weight.T + bias, labels) + 0.01 * weight.square().sum()).backward()
        optimizer.step()
    return weight.detach(), bias.detach()


@pytest.fixture(scope="module")
def trial() -> Trial:
    data = load_digits()
    images, labels = (
        torch.from_numpy(data.images).float()[1200:, None] / 16,
        torch.from_numpy(data.target)[1200:].long(),
    )
    return Trial(parse("pgd10,pgd10-margin"), images, labels, torch.arange(1200, 1797), EPSILON, seed=3)


def exactly_robust(weight: Tensor, bias: Tensor, images: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    """(N,) bool, by linear programming that needs no solver: each pixel alone goes to the end that hurts most."""
    low, high = (images.flatten(1) - epsilon).clamp(0, 1), (images.flatten(1) + epsilon).clamp(0, 1)
    lead = weight[labels][:, None] - weight[None]  # (N, 10, 64): of the true class over each class
    least = (lead.clamp(min=0) * low[:, None] + lead.clamp(max=0) * high[:, None]).sum(2) + bias[labels][:, None] - bias
    return least.scatter(1, labels[:, None], torch.inf).amin(1) > 0


def subject(judge: Classifier, twin: Classifier | None = None, again: Classifier | None = None) -> Subject:
    opened = iter([judge] + [again or judge] * 5)
    return Subject("onnx-int8", "onnx", "int8", "model.onnx", 1, "00", "here", lambda: next(opened), twin)


def examined(trial: Trial, student: Classifier, file: Subject, **rules: float) -> tuple[Examined, Outcome]:
    own = trial.run(student, {"float": student})
    return examine(file, Beside(student, own), trial, Rules(**rules)), own


def checks(one: Examined) -> dict[str, bool]:
    return {check.name: check.passed for check in one.verdict.checks}


def test_a_file_that_answers_like_the_student_survives_with_figures_that_can_be_computed(trained, trial) -> None:
    student = student_of(*trained)
    one, own = examined(trial, student, subject(as_file(student)))
    clean = student(trial.images).argmax(1) == trial.labels
    exact = exactly_robust(*trained, trial.images, trial.labels, EPSILON)
    assert (one.outcome.robust | ~exact).all()  # what no image in the ball can fool, no attack did
    assert one.outcome.robust.sum() - exact.sum() <= 6  # and of the others it missed at most one in a hundred
    assert 0.3 < exact.float().mean() < 0.9
    assert one.outcome.robust.equal(own.robust)
    verdict = one.verdict
    assert verdict.clean_accuracy is not None
    assert verdict.clean_accuracy.value == clean.sum().item() / len(clean)
    assert verdict.robust_accuracy is not None
    assert verdict.robust_accuracy.value == own.robust.sum().item() / len(clean)
    assert verdict.float_robust_accuracy == verdict.robust_accuracy
    assert verdict.change is not None
    assert (verdict.change.robust.value, verdict.change.clean.value, verdict.agreement) == (0, 0, 1)
    assert [attack.name for attack in verdict.attacks] == ["pgd10", "pgd10-margin"]
    assert all(set(attack.sources) == {"float"} for attack in verdict.attacks)
    assert min(attack.robust_accuracy for attack in verdict.attacks) >= verdict.robust_accuracy.value
    assert all(checks(one).values())
    assert verdict.verdict == "survived"


def test_both_the_file_and_the_student_face_the_gradients_of_the_twin(trained, trial) -> None:
    weight, bias = trained
    # So sure of itself that its softmax saturates: the twin, which is not, finds what its own gradients miss.
    student = student_of(500 * weight, 500 * bias)
    moved = student_of(weight + 0.1 * torch.randn(10, 64, generator=torch.Generator().manual_seed(0)), bias)
    trial = replace(trial, attacks=parse("pgd3,pgd10"))
    one, own = examined(trial, student, subject(as_file(moved), twin=moved))

    def survivors(judge: Classifier, *sources: Classifier) -> Tensor:
        robust = torch.ones(len(trial.labels), dtype=torch.bool)
        for attack in trial.attacks:
            for source in sources:
                seeds = derive(3, 0, samples=trial.index)
                arguments = (source, judge, trial.images, trial.labels)
                robust &= ~attack.run(*arguments, seeds=seeds, epsilon=EPSILON)[1]
        return robust

    file, both = survivors(as_file(moved), student, moved), survivors(student, student, moved)
    assert one.outcome.robust.equal(file)
    assert one.float_robust.equal(both)
    assert both.sum() < own.robust.sum()  # or the test could not see whether the student faced the twin
    assert one.verdict.change is not None
    assert one.verdict.change.robust.only_float == (both & ~file).sum()
    assert one.verdict.change.robust.only_artifact == (~both & file).sum()
    for attack in one.verdict.attacks:
        assert set(attack.sources) == {"float", "twin"}
        assert attack.robust_accuracy <= min(attack.sources.values())
    assert one.verdict.twin is not None
    assert one.verdict.twin.agreement == 1
    assert one.verdict.twin.max_abs_difference < 1e-4


def test_a_file_that_became_fragile_has_lost(trained, trial) -> None:
    weight, bias = trained
    noise = torch.randn(10, 64, generator=torch.Generator().manual_seed(1))
    one, _ = examined(trial, student_of(weight, bias), subject(as_file(student_of(weight + 0.6 * noise, bias))))
    assert one.verdict.verdict == "lost"


def test_a_twin_of_another_file_is_not_trusted(trained, trial) -> None:
    weight, bias = trained
    student = student_of(weight, bias)
    one, _ = examined(trial, student, subject(as_file(student), twin=student_of(weight.roll(1, 0), bias)))
    assert not checks(one)["twin_fidelity"]
    assert one.verdict.verdict == "inconclusive"
    assert "twin_fidelity" in one.verdict.why


def test_a_twin_that_answers_with_no_numbers_fails_its_check(trained, trial) -> None:
    student = student_of(*trained)
    bright = trial.images.flatten(1).mean(1).topk(20).values.min()

    def broken(images: Tensor) -> Tensor:
        answers = student(images)
        return torch.where(images.flatten(1).mean(1, keepdim=True) >= bright, torch.nan, answers)

    one, _ = examined(trial, student, subject(as_file(student), twin=Wrapped(broken, differentiable=True)))
    assert not checks(one)["twin_fidelity"]
    assert "with no numbers" in one.verdict.why
    assert one.verdict.twin is not None
    assert one.verdict.twin.max_abs_difference < 1e-4
    assert one.verdict.twin.agreement < 1 - 20 / len(trial.labels) / 2 + 1e-9
    json.dumps(to_dict(one.verdict), allow_nan=False)


def test_a_gain_of_robustness_is_masking_until_shown_otherwise(trained, trial) -> None:
    weight, bias = trained
    student = student_of(weight, bias)
    # The digits' own 17 levels: a change below half of one is undone, and no gradient knows.
    coarse = Wrapped(lambda images: student((images * 16).round() / 16).detach(), differentiable=False)
    one, _ = examined(trial, student, subject(coarse))
    assert one.verdict.change is not None
    assert one.verdict.change.robust.low > 0
    assert not checks(one)["robust_accuracy_did_not_rise"]
    assert one.verdict.verdict == "inconclusive"


def test_a_file_that_does_not_repeat_itself_is_found_out(trained, trial) -> None:
    student = student_of(*trained)
    generator = torch.Generator().manual_seed(0)
    noisy = Wrapped(
        lambda images: student(images).detach() + 0.1 * torch.randn(len(images), 10, generator=generator),
        differentiable=False,
    )
    one, _ = examined(trial, student, subject(noisy))
    assert not checks(one)["same_answer_twice"]
    assert not checks(one)["fooled_replayed"]
    assert one.verdict.verdict == "inconclusive"


def test_what_a_freshly_opened_file_denies_fails_the_replay(trained, trial) -> None:
    weight, bias = trained
    student = student_of(weight, bias)
    one, _ = examined(
        trial, student, subject(as_file(student), again=as_file(student_of(0.9 * weight.roll(1, 1), bias)))
    )
    assert not checks(one)["fooled_replayed"]
    assert checks(one)["same_answer_twice"]
    assert one.verdict.verdict == "inconclusive"


def test_a_file_whose_answer_depends_on_the_batch_is_asked_image_by_image(trained, trial) -> None:
    student = student_of(*trained)
    asked: list[int] = []

    def dynamic(images: Tensor) -> Tensor:
        asked.append(len(images))
        return student(images / images.max()).detach()  # one scale for the whole batch, as dynamic quantization has

    darker = trial.images * torch.linspace(0.3, 1, len(trial.images)).view(-1, 1, 1, 1)
    judged = one_by_one_where_needed(Wrapped(dynamic, differentiable=False), darker)
    asked.clear()
    answers = judged(darker[:30])
    assert asked == [1] * 30
    assert answers[4].allclose(student(darker[4:5] / darker[4].max())[0])
    steady = as_file(student)
    assert one_by_one_where_needed(steady, darker) is steady


@pytest.mark.parametrize("attacks", ["square40", "fgsm,square40"])
def test_an_attack_on_scores_is_faced_once_by_file_and_student_alike(trained, trial, attacks: str) -> None:
    student = student_of(*trained)
    some = replace(trial, attacks=parse(attacks))
    one, own = examined(some, student, subject(as_file(student), twin=student))
    assert one.outcome.fooled["square40", "scores"].equal(own.fooled["square40", "scores"])
    assert set(one.verdict.attacks[-1].sources) == {"scores"}
    assert one.float_robust.equal(own.robust)
    truth = exactly_robust(*trained, some.images, some.labels, EPSILON)
    found = ~one.outcome.fooled["square40", "scores"]
    assert (found | ~truth).all()
    assert truth.sum() < found.sum() < (one.outcome.clean.argmax(1) == some.labels).sum()


def test_a_tie_is_decided_by_the_replay_and_anything_else_is_a_mismatch() -> None:
    labels = torch.zeros(4, dtype=torch.int64)
    outcome = Outcome(
        torch.zeros(4, 2),
        {("pgd1", "float"): torch.tensor([True, True, False, False])},
        torch.zeros(4, 1, 1, 1),
        torch.tensor([0, 0, -1, -1]),
        {},
    )
    said = torch.tensor([[1.0, 9.0], [9.0, 9.0], [9.0, 1.0], [9.0, 9.0000095]])  # the second now right, the last wrong
    settled, check = settle(outcome, said, labels)
    assert check.passed
    assert check.value == 0.5
    assert settled.robust.tolist() == [False, True, True, False]
    assert settled.fooled["pgd1", "float"].tolist() == [True, False, False, True]
    assert settled.won() == (["pgd1", "", "", "pgd1"], ["float", "", "", "float"])
    unchanged, check = settle(outcome, torch.tensor([[1.0, 9.0], [9.0, 8.0], [9.0, 1.0], [9.0, 1.0]]), labels)
    assert not check.passed
    assert unchanged.robust.equal(outcome.robust)


def test_answers_that_are_no_numbers_are_refused(trained, trial) -> None:
    student = student_of(*trained)
    broken = Wrapped(lambda images: student(images).detach() / 0, differentiable=False)
    with pytest.raises(EdgekitError, match="numbers that are none"):
        examined(trial, student, subject(broken))


def test_of_a_student_that_guesses_nothing_is_decided_and_a_file_that_guesses_has_lost(trained, trial) -> None:
    student = student_of(*trained)
    constant = Wrapped(lambda images: 0 * student(images) + torch.eye(10)[0], differentiable=True)
    guess = (trial.labels == 0).float().mean().item()
    one, _ = examined(trial, constant, replace(subject(as_file(constant)), chance=guess))
    assert one.verdict.verdict == "inconclusive"
    assert "no more than guessing" in one.verdict.why
    assert "train it longer" in one.verdict.why
    other, _ = examined(trial, student, replace(subject(as_file(constant)), chance=guess))
    assert other.verdict.verdict == "lost"


# From here on a real run, exported by the real command (tests/conftest.py); each test works on a copy or writes beside.


@pytest.fixture
def run(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(workplace / "runs", tmp_path / "runs", symlinks=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "tiny-1"


@pytest.fixture(scope="module")
def verified(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A copy of the run, the archive beside it as saved.npz, and the document."""
    place = tmp_path_factory.mktemp("verified")
    shutil.copytree(workplace / "runs" / "tiny-1", place / "tiny-1")
    document = verify(
        place / "tiny-1", attack="fgsm,pgd3", samples=150, seed=4, save_adversarial=place / "saved.npz", tolerance=0.1
    )
    return place, document


def test_the_document_is_what_the_contract_says(verified) -> None:
    import jsonschema

    place, document = verified
    schema = Path(__file__).parents[1] / "edgekit" / "schemas" / "verdict.json"
    jsonschema.validate(document, json.loads(schema.read_text()))
    assert json.loads((place / "tiny-1/verdicts/1/verdict.json").read_text()) == document
    assert {"attacks": document["attacks"], "samples": document["samples"], "seed": document["seed"]} == {
        "attacks": ["fgsm", "pgd3"],
        "samples": 150,
        "seed": 4,
    }
    assert document["epsilon"] == 0.05  # the recipe's
    assert [one["name"] for one in document["artifacts"]] == ["onnx-fp32", "onnx-int8", "torchscript-fp32"]
    for one in document["artifacts"]:
        assert (place / "tiny-1" / one["file"]).stat().st_size == one["bytes"]
        # Three steps are too few, and the checks may say so; nothing else is wrong with these files.
        failed = {check["name"] for check in one["checks"] if not check["passed"]}
        assert failed <= {"more_steps_change_little", "huge_epsilon_fools"}, one["checks"]
        sources = {"float", "twin"} if one["name"] == "onnx-int8" else {"float"}
        assert all(set(attack["sources"]) == sources for attack in one["attacks"])
    assert "twin" in document["artifacts"][1]
    assert document["looks"] == 1


def test_samples_jsonl_repeats_every_figure(verified) -> None:
    place, document = verified
    lines = [json.loads(line) for line in (place / "tiny-1/verdicts/1/samples.jsonl").read_text().splitlines()]
    assert len(lines) == 3 * 150
    for one in document["artifacts"]:
        own = [line for line in lines if line["artifact"] == one["name"]]
        assert len({line["index"] for line in own}) == 150
        counted = {
            key: sum(line[key] for line in own) / 150
            for key in ("file_clean", "file_robust", "float_clean", "float_robust")
        }
        assert counted["file_clean"] == one["clean_accuracy"]["value"]
        assert counted["file_robust"] == one["robust_accuracy"]["value"]
        assert counted["float_clean"] == document["float"]["clean_accuracy"]["value"]
        assert counted["float_robust"] == one["float_robust_accuracy"]["value"]
        assert one["change"]["robust"]["only_float"] == sum(x["float_robust"] and not x["file_robust"] for x in own)
        for line in own:
            assert (line["attack"] == "clean") == (not line["file_clean"])
            assert (line["attack"] == "") == line["file_robust"]


def test_the_archive_replayed_with_plain_runtimes_fools_exactly_where_it_says(verified) -> None:
    import onnxruntime

    place, document = verified
    saved = numpy.load(place / "saved.npz", allow_pickle=False)
    images, labels, index = saved["images"], saved["labels"], saved["index"]
    assert images.dtype == numpy.float32
    assert labels.dtype == numpy.int64
    assert (images * 255).round().astype("float32") / numpy.float32(255) == pytest.approx(images, abs=1e-7)
    assert labels.tolist() == load_digits().target[index].tolist()
    for one in document["artifacts"]:
        path, name = place / "tiny-1" / one["file"], one["name"]
        adversarial = saved[f"{name}/adversarial"]
        assert adversarial.dtype == numpy.float32
        assert adversarial.min() >= 0
        assert adversarial.max() <= 1
        assert numpy.abs(adversarial - images).max() <= numpy.float32(document["epsilon"] + 1e-6)
        if one["format"] == "onnx":
            session = onnxruntime.InferenceSession(str(path))
            answers = session.run(None, {session.get_inputs()[0].name: adversarial})[0]
        else:
            answers = torch.jit.load(str(path))(torch.from_numpy(adversarial)).detach().numpy()
        fooled = saved[f"{name}/fooled"]
        assert (answers.argmax(1) != labels).tolist() == fooled.tolist()
        assert 1 - fooled.mean() == pytest.approx(one["robust_accuracy"]["value"])
        clean = saved[f"{name}/attack"] == "clean"
        assert (adversarial[clean] == images[clean]).all()
        assert set(saved[f"{name}/attack"]) <= {"", "clean", "fgsm", "pgd3"}
        assert set(saved[f"{name}/source"][fooled & ~clean]) <= {"float", "twin"}
        assert ((saved[f"{name}/source"] == "") == (~fooled | clean)).all()


def test_the_same_seed_gives_the_same_verdict_and_a_second_look_says_so(verified, capsys) -> None:
    place, first = verified
    again = verify(place / "tiny-1" / "artifacts" / "onnx-int8", attack="fgsm,pgd3", samples=150, seed=4, tolerance=0.1)
    assert again["looks"] == 2
    assert (place / "tiny-1/verdicts/2/verdict.json").is_file()
    before, after = first["artifacts"][1], again["artifacts"][0]
    for one in (*before["attacks"], *after["attacks"]):
        one.pop("seconds")
    before.pop("checks_seconds"), after.pop("checks_seconds")
    assert after == before
    said = capsys.readouterr()
    assert said.out == ""  # stdout belongs to the caller
    assert "150 samples" in said.err  # what so many can decide is said before anything else


def test_the_latest_run_is_the_default_and_only_its_whole_artifacts_count(run) -> None:
    (run / "artifacts" / ".onnx-int8.x.part").mkdir()
    shutil.rmtree(run / "artifacts" / "onnx-fp32")
    document = verify(attack="fgsm", samples=20, epsilon="8/255")
    assert [one["name"] for one in document["artifacts"]] == ["onnx-int8", "torchscript-fp32"]
    assert document["epsilon"] == 8 / 255


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"epsilon": "1.5"}, "at most 1"),
        ({"epsilon": 8}, "write 8/255"),
        ({"epsilon": "8/0"}, "fraction such as 8/255"),
        ({"epsilon": "nan"}, "at most 1"),
        ({"epsilon": "0"}, "above 0"),
        ({"epsilon": "-1/255"}, "above 0"),
        ({"epsilon": "1/2/3"}, "fraction such as 8/255"),
        ({"epsilon": "eight"}, "fraction such as 8/255"),
        ({"attack": "pgd0"}, "Did you mean 'pgd20'"),
        ({"attack": "pdg20"}, "Did you mean 'pgd20'"),
        ({"norm": "L2"}, "an L2 radius has no default"),
        ({"norm": "L1", "epsilon": 1}, "there is no norm 'L1'"),
        ({"norm": "L2", "epsilon": 0}, "an epsilon is above 0"),
        ({"report": "runs"}, "--report runs: this is a folder"),
        ({"junit": "none/x.xml"}, "its folder is not there"),
        ({"judge": "true"}, "one judge answers for one file"),
        ({"samples": 0}, "at least one sample"),
        ({"tolerance": -0.1}, "--tolerance"),
        ({"clean_tolerance": float("nan")}, "--clean-tolerance"),
        ({"at_least": 40}, "--at-least"),
        ({"seed": -1}, "a seed goes from"),
        ({"seed": 2**70}, "a seed goes from"),
        ({"what": "no/such/run"}, "there is no such run"),
        ({"what": "runs/tiny-1/recipe.toml"}, "not an ONNX model"),
        ({"mean": "0.5"}, "--mean: is for a file that belongs to no run"),
        ({"what": "runs/tiny-1/artifacts"}, "not a run folder"),
        ({"save_adversarial": "runs"}, "a folder, not a file"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(run, options: dict[str, Any], said: str) -> None:
    before = sorted(run.parents[1].rglob("*"))
    with pytest.raises(EdgekitError) as caught:
        verify(**({"attack": "fgsm", "samples": 20} | options))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    assert sorted(run.parents[1].rglob("*")) == before


def test_a_file_changed_after_its_export_is_refused(run) -> None:
    path = run / "artifacts" / "onnx-int8" / "model.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(EdgekitError, match="has changed since it was exported"):
        verify(attack="fgsm", samples=20)


def test_a_file_of_another_student_is_refused(run) -> None:
    record = json.loads((run / "artifacts" / "onnx-int8" / "artifact.json").read_text())
    record["made_from"]["student_sha256"] = "0" * 64
    (run / "artifacts" / "onnx-int8" / "artifact.json").write_text(json.dumps(record))
    with pytest.raises(EdgekitError, match="another student"):
        verify(attack="fgsm", samples=20)


def test_an_artifact_outside_a_run_is_refused(run, tmp_path) -> None:
    shutil.copytree(run / "artifacts" / "onnx-int8", tmp_path / "alone")
    with pytest.raises(EdgekitError, match="lies in no run"):
        verify(tmp_path / "alone", attack="fgsm")


def test_without_an_exported_file_the_command_that_makes_one_is_named(run) -> None:
    shutil.rmtree(run / "artifacts")
    with pytest.raises(EdgekitError, match=r"there is no exported file yet\. Run: edgekit export --int8"):
        verify(attack="fgsm")


def test_test_images_that_changed_are_refused(run) -> None:
    info = json.loads((run / "run.json").read_text())
    info["data"]["sha256"] = "0" * 64
    (run / "run.json").write_text(json.dumps(info))
    with pytest.raises(EdgekitError, match="the data has changed"):
        verify(attack="fgsm", samples=20)


def test_a_file_whose_runtime_is_missing_is_not_run_and_the_others_are(run, monkeypatch) -> None:
    from edgekit import judge
    from edgekit.errors import ENVIRONMENT

    opened = judge.open

    def without_torchscript(artifact, **options):
        if artifact.format == "torchscript":
            raise EdgekitError("its runtime is not installed", exit_code=ENVIRONMENT)
        return opened(artifact, **options)

    monkeypatch.setattr(judge, "open", without_torchscript)
    document = verify(attack="fgsm", samples=60)
    missing = document["artifacts"][2]
    assert (missing["verdict"], missing["why"]) == ("not_run", "its runtime is not installed")
    assert "robust_accuracy" not in missing
    assert not document["passed"]
    shutil.rmtree(run / "artifacts" / "onnx-fp32")
    shutil.rmtree(run / "artifacts" / "onnx-int8")
    with pytest.raises(EdgekitError, match="nothing could run here") as caught:
        verify(attack="fgsm", samples=60)
    assert caught.value.exit_code == 4


def test_a_fault_in_one_file_leaves_the_others_their_verdicts(run, monkeypatch, capsys) -> None:
    from edgekit import judge

    opened = judge.open

    def broken_int8(artifact, **options):
        if artifact.name == "onnx-int8":
            return Wrapped(lambda images: torch.full((len(images), 10), torch.nan), differentiable=False)
        return opened(artifact, **options)

    monkeypatch.setattr(judge, "open", broken_int8)
    document = verify(attack="fgsm", samples=60)
    first, broken, last = document["artifacts"]
    assert broken["verdict"] == "not_run"
    assert "numbers that are none" in broken["why"]
    assert "onnx-int8 is not judged: artifacts/onnx-int8/model.onnx" in capsys.readouterr().err
    assert "robust_accuracy" in first
    assert "robust_accuracy" in last
    assert not document["passed"]
    assert (run / "verdicts/1/verdict.json").is_file()
    for name in ("onnx-fp32", "torchscript-fp32"):
        shutil.rmtree(run / "artifacts" / name)
    with pytest.raises(EdgekitError, match="numbers that are none") as caught:  # alone, it is bad input as before
        verify(attack="fgsm", samples=60)
    assert caught.value.exit_code == 2


def test_an_attack_that_only_some_files_can_face_judges_those(run) -> None:
    document = verify(attack="diva2", samples=20)
    assert [one["verdict"] == "not_run" for one in document["artifacts"]] == [True, False, True]


def test_a_recipe_edited_after_the_export_is_refused_for_it_may_split_the_data_otherwise(run) -> None:
    recipe = run / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("split_seed = 0", "split_seed = 9"))
    with pytest.raises(EdgekitError, match=r"recipe.toml: the recipe has changed since the export"):
        verify(run, attack="fgsm", samples=20)
