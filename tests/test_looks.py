"""Further samples until a file is decided: a linear student on digits, then the command on a real run."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy
import pytest
import torch
from commandline import command
from sklearn.datasets import load_digits
from torch import Tensor, nn

import edgekit
from edgekit import archive, looks
from edgekit.attacks import parse
from edgekit.classifier import Wrapped
from edgekit.examine import Subject, Trial
from edgekit.looks import Looks, ordered, until_decided
from edgekit.planned import plan
from edgekit.statistics import tango
from edgekit.verdict import Rules
from edgekit.verifier import verify

SCHEMA = Path(edgekit.__file__).parent / "schemas" / "verdict.json"


@pytest.fixture(scope="module")
def linear() -> tuple[Tensor, Tensor]:
    data = load_digits()
    images, labels = torch.from_numpy(data.data).float()[:1000] / 16, torch.from_numpy(data.target)[:1000]
    weight, bias = torch.zeros(10, 64, requires_grad=True), torch.zeros(10, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], 0.05)
    for _ in range(60):
        optimizer.zero_grad()
        (nn.functional.cross_entropy(images @ weight.T + bias, labels) + 0.01 * weight.square().sum()).backward()
        optimizer.step()
    return weight.detach(), bias.detach()


def student_of(weight: Tensor, bias: Tensor) -> Wrapped:
    return Wrapped(lambda images: images.flatten(1) @ weight.T + bias, differentiable=True)


def as_file(student: Wrapped, name: str = "onnx-int8", twin: Wrapped | None = None) -> Subject:
    judged = Wrapped(lambda images: student(images).detach(), differentiable=False)
    return Subject(name, "onnx", "int8", "model.onnx", 1, "0" * 64, "here", lambda: judged, twin)


@pytest.fixture(scope="module")
def trial() -> Trial:
    data = load_digits()
    images, labels = torch.from_numpy(data.images).float()[1000:, None] / 16, torch.from_numpy(data.target)[1000:]
    index = torch.arange(1000, 1797)
    order = ordered(labels, index, 0)
    attacks = parse("pgd5x2,square30")
    return Trial(attacks, images[order], labels[order].long(), index[order], 0.03, seed=3)


def test_every_beginning_of_the_order_has_each_classs_share() -> None:
    labels = torch.tensor([0] * 600 + [1] * 300 + [2] * 100)[torch.randperm(1000)]
    index = torch.arange(5000, 6000)
    order = ordered(labels, index, 7)
    assert order.sort().values.equal(torch.arange(1000))
    for count in (10, 50, 123, 400, 999):
        shares = torch.bincount(labels[order[:count]], minlength=3) / count
        assert (shares - torch.tensor([0.6, 0.3, 0.1])).abs().max() <= 2 / count
    assert not order.equal(ordered(labels, index, 8))
    # Drawn from the seed and the sample: the order in which they are given decides nothing.
    mixed = torch.randperm(1000)
    assert index[mixed][ordered(labels[mixed], index[mixed], 7)].equal(index[order])
    assert not order.equal(order.sort().values)


def test_what_a_sample_goes_through_does_not_depend_on_its_look(linear, trial) -> None:
    student = student_of(*linear)
    file = student_of(linear[0] + 0.02 * torch.randn(10, 64, generator=torch.Generator().manual_seed(0)), linear[1])
    rules, several, single = Rules(tolerance=0.0, clean_tolerance=0.0), plan(797), plan(797, looks=1)
    asked = as_file(file, twin=file)
    by_looks, seen = until_decided(asked, Looks(several, trial, student), rules)
    at_once, all_seen = until_decided(asked, Looks(single, trial, student), rules)
    assert by_looks.verdict.plan is not None
    assert by_looks.verdict.plan.look == 5  # with no tolerance at all nothing is decided before the end
    assert by_looks.outcome.robust.equal(at_once.outcome.robust)
    assert by_looks.outcome.winner.equal(at_once.outcome.winner)
    assert by_looks.outcome.fooled.keys() == at_once.outcome.fooled.keys()
    for pair, hit in by_looks.outcome.fooled.items():
        assert hit.equal(at_once.outcome.fooled[pair]), pair
    assert by_looks.float_robust.equal(at_once.float_robust)
    assert by_looks.outcome.adversarial.allclose(at_once.outcome.adversarial, atol=1e-6)
    assert seen.own is not None
    assert all_seen.own is not None
    assert seen.own.robust.equal(all_seen.own.robust)
    assert 0.2 < by_looks.outcome.robust.float().mean() < 0.9
    # And not on the seed alone: another one has other outcomes, or the comparison above would see nothing.
    other, _ = until_decided(asked, Looks(single, replace(trial, seed=4), student), rules)
    assert not other.outcome.adversarial.allclose(at_once.outcome.adversarial, atol=1e-6)


def test_a_file_is_left_alone_once_it_is_decided_and_the_next_one_goes_on(linear, trial, capsys) -> None:
    weight, bias = linear
    student, counted = student_of(weight, bias), []
    noise = torch.randn(10, 64, generator=torch.Generator().manual_seed(1))
    broken, slightly = student_of(weight + 0.6 * noise, bias), student_of(weight + 0.012 * noise, bias)

    def watch(samples: int):
        return lambda name, sources: lambda attack, done: counted.append((name, attack.name, done))

    several = Looks(plan(797), trial, student, watch=watch)
    rules = Rules()
    lost, first = until_decided(as_file(broken, "broken"), several, rules)
    assert lost.verdict.verdict == "lost"
    assert lost.verdict.plan is not None
    assert (lost.verdict.plan.looks, lost.verdict.plan.decided) == (5, True)
    look = lost.verdict.plan.look
    assert look < 5
    assert len(first.trial.labels) == lost.verdict.plan.samples[look - 1] == len(lost.outcome.robust)
    assert several.drawn() == len(first.trial.labels)
    longer, second = until_decided(as_file(slightly, "slightly"), several, rules)
    assert longer.verdict.plan is not None
    assert longer.verdict.plan.look > look
    # The student is attacked once for both files, and no sample twice.
    student_done = sum(done for name, attack, done in counted if name.startswith("float") and attack == "pgd5x2")
    assert student_done == len(second.trial.labels) == several.drawn()
    broken_done = sum(done for name, attack, done in counted if name.startswith("broken") and attack == "pgd5x2")
    assert broken_done == len(first.trial.labels)
    told = [line for line in capsys.readouterr().err.splitlines() if ": look " in line]
    assert [line.split(",")[0] for line in told if line.startswith("broken")] == [
        f"broken: look {number} of 5" for number in range(1, look + 1)
    ]
    assert told[look - 1].endswith("decided, lost")
    assert all(line.endswith(": not decided") for line in told[: look - 1])


def test_the_intervals_are_those_of_the_look_and_the_figures_those_of_its_samples(linear, trial) -> None:
    weight, bias = linear
    student = student_of(weight, bias)
    moved = student_of(weight + 0.6 * torch.randn(10, 64, generator=torch.Generator().manual_seed(1)), bias)
    one, seen = until_decided(as_file(moved), Looks(plan(797), trial, student), Rules())
    verdict, made = one.verdict, plan(797)
    assert verdict.plan is not None
    assert verdict.change is not None
    look, n = verdict.plan.look, verdict.plan.samples[verdict.plan.look - 1]
    assert verdict.plan.boundary == made.boundaries[look - 1]
    robust = verdict.change.robust
    confidence = made.confidence(look)
    assert (robust.low, robust.high) == tango(robust.only_float, robust.only_artifact, n, confidence)
    assert robust.high > tango(robust.only_float, robust.only_artifact, n)[1]  # wider than one look's
    assert verdict.robust_accuracy is not None
    assert verdict.robust_accuracy.value == seen.outcome.robust.sum().item() / n
    assert [check.name for check in verdict.checks].count("steps_increase_loss") == 1


def test_checks_are_made_once_and_a_failed_one_is_not_looked_away(linear, trial, monkeypatch) -> None:
    made = []
    monkeypatch.setattr(looks.conclude.__globals__["checks"], "scrutinize", lambda *a, **k: made.append(1) or [])
    student = student_of(*linear)
    # A twin of another file: it never decides as the file does, and the verdict is inconclusive for that alone.
    stranger = student_of(linear[0].roll(1, 0), linear[1])
    one, _ = until_decided(as_file(student, twin=stranger), Looks(plan(797), trial, student), Rules(0.1, 0.1))
    assert len(made) == 1
    assert one.verdict.verdict == "inconclusive"
    assert "twin_fidelity" in one.verdict.why
    assert one.verdict.plan is not None
    assert one.verdict.plan.decided
    assert one.verdict.plan.look < 5  # it is not given further looks to pass


@pytest.mark.parametrize("broken_at", [1, 2])
def test_a_replay_that_failed_at_any_look_fails_the_check(linear, trial, broken_at: int) -> None:
    student = student_of(*linear)
    looked = Looks(plan(797), trial, student)
    opened = looks.prepare(as_file(student), student, looked.new(1))
    parts = [looks.face(opened, looked.beside(look), looked.new(look)) for look in (1, 2)]
    assert looks._more(*parts).repeats.passed
    failed = replace(parts[broken_at - 1].repeats, passed=False, value=0.98)
    parts[broken_at - 1] = replace(parts[broken_at - 1], repeats=failed)
    assert looks._more(*parts).repeats == failed


def test_what_was_finished_is_not_attacked_again(linear, trial, tmp_path) -> None:
    student, rules = student_of(*linear), Rules(tolerance=0.0, clean_tolerance=0.0)
    (tmp_path / "verdicts").mkdir()

    def run(fresh: bool, stop_after: int | None = None):
        notebook, done = archive.Notebook(tmp_path / "verdicts", "k" * 64, fresh=fresh), []

        def watch(samples: int):
            def told(attack, count):
                if stop_after is not None and len(done) >= stop_after:
                    raise KeyboardInterrupt
                done.append(count)

            return lambda name, sources: told

        looked = Looks(plan(797), trial, student, watch=watch, memory=notebook.page)
        return until_decided(as_file(student), looked, rules), notebook

    undisturbed, _ = run(True)
    with pytest.raises(KeyboardInterrupt):
        run(True, stop_after=7)
    kept = archive.Notebook(tmp_path / "verdicts", "k" * 64, fresh=False).parts
    assert kept == 8
    (resumed, _), notebook = run(False)
    before = replace(undisturbed[0].verdict, attacks=(), checks_seconds=None)
    assert replace(resumed.verdict, attacks=(), checks_seconds=None) == before
    assert notebook.parts > kept


# From here on the command.


@pytest.fixture
def run(workplace: Path, tmp_path: Path) -> Path:
    shutil.copytree(workplace / "runs", tmp_path / "runs", symlinks=True)
    return tmp_path


def test_the_command_says_each_look_and_the_document_holds_the_plan(run: Path) -> None:
    arguments = ["--attack", "pgd3", "--until-decided", "--tolerance", "6", "--clean-tolerance", "6", "--json"]
    copies = ["--markdown", "v.md", "--junit", "v.xml", "--save-adversarial", "a.npz"]
    done = command("verify", *arguments, *copies, cwd=run)
    document = json.loads(done.stdout)
    jsonschema.validate(document, json.loads(SCHEMA.read_text()))
    # The intervals decide; three steps are few, and a check that says so keeps its word.
    sound = all(check["passed"] for one in document["artifacts"] for check in one["checks"])
    assert done.returncode == (0 if sound else 3), done.stderr
    assert "Up to 5 looks, at 144, 288, 432, 576, 719 samples" in done.stderr
    for one in document["artifacts"]:
        made = one["plan"]
        assert made["samples"] == [144, 288, 432, 576, 719]
        assert (made["decided"], made["boundary"]) == (True, made["boundaries"][made["look"] - 1])
        assert f"{one['name']}: look {made['look']} of 5, {made['samples'][made['look'] - 1]} samples" in done.stderr
    assert document["samples"] == max(one["plan"]["samples"][one["plan"]["look"] - 1] for one in document["artifacts"])
    assert document["samples"] < 719  # a wide tolerance is decided early
    assert document["looks"] == 1
    lines = (run / "runs/tiny-1/verdicts/1/samples.jsonl").read_text().splitlines()
    drawn = [one["plan"]["samples"][one["plan"]["look"] - 1] for one in document["artifacts"]]
    assert len(lines) == sum(drawn)
    with numpy.load(run / "a.npz") as saved:
        assert len(saved["images"]) == len(saved["index"]) == document["samples"]
        for one, count in zip(document["artifacts"], drawn, strict=True):
            assert len(saved[f"{one['name']}/fooled"]) == count
            labelled = [json.loads(line) for line in lines if json.loads(line)["artifact"] == one["name"]]
            assert [line["index"] for line in labelled] == saved["index"][:count].tolist()
            assert [not line["file_robust"] for line in labelled] == saved[f"{one['name']}/fooled"].tolist()
    page = (run / "runs/tiny-1/verdicts/1/report.html").read_text()
    for text in (page, (run / "v.md").read_text(), (run / "v.xml").read_text()):
        assert f"of 5, at {drawn[0]} of at most 719 samples" in text
    assert "intervals that allow for 5 planned looks" in page


def test_samples_are_the_most_that_are_drawn(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    file = "runs/tiny-1/artifacts/onnx-fp32"
    document = verify(file, attack="fgsm", until_decided=True, samples=60, tolerance=0.0)
    (one,) = document["artifacts"]
    assert (one["plan"]["samples"], one["plan"]["look"]) == ([12, 24, 36, 48, 60], 5)
    assert not one["plan"]["decided"]
    assert one["verdict"] == "inconclusive"
    assert document["samples"] == 60
    assert "plan" not in verify(file, attack="fgsm", samples=60)["artifacts"][0]


def test_where_nothing_is_asked_nothing_can_be_decided(run: Path) -> None:
    pictures = run / "photos"
    from PIL import Image

    data = load_digits()
    for number in range(40):
        place = pictures / str(data.target[number])
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray((data.images[number] * 255 / 16).round().astype("uint8")).save(place / f"{number}.png")
    file = run / "runs/tiny-1/artifacts/onnx-fp32/model.onnx"
    before = sorted(run.rglob("*"))
    done = command("verify", file, "--data", "photos", "--attack", "fgsm", "--until-decided", cwd=run)
    assert done.returncode == 2
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("edgekit: ")]
    assert "there is nothing to decide" in said
    assert "--at-least P" in said
    assert not [path for path in set(run.rglob("*")) - set(before) if "verdict" in path.name]
    done = command(
        "verify", file, "--data", "photos", "--attack", "fgsm", "--until-decided", "--at-least", "99", "--json", cwd=run
    )
    document = json.loads(done.stdout)
    assert document["artifacts"][0]["plan"]["looks"] == 5
    assert document["verdict"] in ("lost", "inconclusive")
    assert "robust accuracy" in done.stderr
