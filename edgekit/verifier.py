"""Attacks x artifacts -> Verdict: every file of a run is attacked in its own runtime, beside the float student.

`verify` is the command; `examine` is its heart and knows nothing of runs, files and terminals.
"""

import contextlib
import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from edgekit import artifact as artifacts
from edgekit import data, judge, machine, models, runs, twin, verdict
from edgekit.artifact import Artifact
from edgekit.attacks import Attack, parse
from edgekit.attacks.campaign import CHUNK, Outcome, confront
from edgekit.classifier import Classifier, Wrapped, predict
from edgekit.console import progress, say
from edgekit.errors import ENVIRONMENT, EdgekitError
from edgekit.files import sha256, write_json, write_text, writing
from edgekit.recipe import number, read
from edgekit.runs import Run
from edgekit.statistics import power_sentence
from edgekit.verdict import ArtifactVerdict, AttackResult, Check, FloatStudent, Rules, Twin, Verdict

SAMPLES = 1000
FAITHFUL = 0.99  # agreement of a twin with its file below which its gradients are not those of the file
ROUNDING = 1e-4  # two answers of one file that differ by less than this share of its largest logit are the same
SPLIT = "test"

Advance = Callable[[Attack, int], None]
Watch = Callable[[str, int], Advance]


@dataclass(frozen=True)
class Trial:
    """What every judge faces: attacks on (N, C, H, W) float32 images in [0, 1] with (N,) labels and (N,) places."""

    attacks: tuple[Attack, ...]
    images: Tensor
    labels: Tensor
    index: Tensor
    epsilon: float
    seed: int = 0

    def run(self, judge: Classifier, sources: dict[str, Classifier], advance: Advance = lambda *_: None) -> Outcome:
        return confront(
            judge,
            sources,
            self.attacks,
            self.images,
            self.labels,
            self.index,
            seed=self.seed,
            epsilon=self.epsilon,
            advance=advance,
        )


@dataclass(frozen=True)
class Subject:
    """A file under attack: what the verdict says of it, how it is opened, and its differentiable copy if it has one."""

    name: str
    format: str
    precision: str
    file: str
    bytes: int
    sha256: str
    judged_on: str
    open: Callable[[], Classifier]
    twin: Classifier | None = None

    def about(self) -> dict[str, Any]:
        """The fields that a verdict repeats."""
        return {key: getattr(self, key) for key in ("name", "format", "precision", "file", "bytes", "sha256")}


@dataclass(frozen=True)
class Examined:
    """One file's verdict, and what it and the float student did on each sample."""

    verdict: ArtifactVerdict
    outcome: Outcome
    float_robust: Tensor  # (N,) bool, under all that the file faced


def verify(
    what: str | Path | None = None,
    *,
    attack: str = "pgd20",
    samples: int | None = None,
    epsilon: float | str | None = None,
    norm: str | None = None,
    tolerance: float = 0.02,
    clean_tolerance: float = 0.02,
    at_least: float | None = None,
    seed: int = 0,
    save_adversarial: str | Path | None = None,
) -> dict[str, Any]:
    """Attack exported files in their own runtimes and say whether the student's robustness survived in them.

    Args:
        what: a run folder, or one artifact folder of a run; every artifact of the latest run by default.
        attack: names as attacks.parse takes them, separated by commas; robust accuracy is the worst case over all.
        samples: test images, a seeded, stratified draw; 1,000, or all where there are fewer.
        epsilon: radius in [0, 1] pixels, a number or a fraction such as "8/255"; the recipe's by default.
        norm: "Linf".
        tolerance, clean_tolerance: the loss of robust and clean accuracy that is borne, as fractions.
        at_least: the robust accuracy that each file must reach as well, a fraction.
        seed: of the draw of samples and of every attack.
        save_adversarial: an .npz file for the adversarial images (CLI.md).
    Returns:
        The document that `--json` prints; it is also kept as verdicts/<n>/verdict.json in the run's folder.
    Raises:
        EdgekitError: impossible options, nothing to verify, or a file, student or data that changed since the export.
    """
    attacks = parse(attack)
    rules = _rules(tolerance, clean_tolerance, at_least)
    if (norm or "Linf") != "Linf":
        raise EdgekitError(f"the norm '{norm}' is not there in this version", where="--norm", mend="Known: Linf")
    if samples is not None and samples < 1:
        raise EdgekitError("at least one sample is needed", where=f"--samples {samples}")
    if not 0 <= seed < 2**31:
        raise EdgekitError("a seed goes from 0 to 2,147,483,647", where=f"--seed {seed}")
    radius = None if epsilon is None else _radius(epsilon)
    run, found = _found(what)
    recipe = read(run.recipe_file)
    dataset = _same_data(run, recipe.data)
    split = dataset.test[data.stratified(dataset.test.labels, samples or SAMPLES, seed)]
    if samples is not None and len(split) < samples:
        say(f"There are {len(split):,} test images; all of them are drawn.")
    trial = Trial(
        attacks, split.floats(), split.labels, split.index, recipe.inner.epsilon if radius is None else radius, seed
    )
    say(power_sentence(len(split), rules.tolerance, rules.clean_tolerance))
    with contextlib.ExitStack() as stack:
        threads = min(run.info().get("threads", 1), machine.cores())
        stack.enter_context(_torch_threads(threads))
        # The channels-last layout halves the time of a convolution's two passes on a CPU.
        student = models.load(run.student).requires_grad_(False).to(memory_format=torch.channels_last)
        archive = stack.enter_context(_archive(save_adversarial, trial)) if save_adversarial is not None else None
        result, lines = _examine_all(run, found, student, trial, rules, archive, threads)
        document = verdict.summarize(
            rules,
            result.artifacts,
            attacks=[one.name for one in attacks],
            norm="Linf",
            epsilon=trial.epsilon,
            samples=len(split),
            seed=seed,
            data=verdict.Data(dataset.name, SPLIT, dataset.sha256),
            machine=verdict.Machine(**judge.machine_block()),
            float_student=result.float_student,
            looks=_looks(run, [one.sha256 for one in found], dataset.sha256),
        )
    return _keep(run, document, lines)


@dataclass(frozen=True)
class _Results:
    artifacts: list[ArtifactVerdict]
    float_student: FloatStudent


def _examine_all(
    run: Run,
    found: Sequence[Artifact],
    student: Classifier,
    trial: Trial,
    rules: Rules,
    archive: Callable[[str, Examined], None] | None,
    threads: int,
) -> tuple[_Results, list[dict[str, Any]]]:
    """Examine every artifact; also the lines of samples.jsonl."""
    with progress() as bar:

        def watch(name: str, sources: int) -> Advance:
            tasks: dict[str, Any] = {}

            def advance(attack: Attack, samples: int) -> None:
                if attack.name not in tasks:
                    total = (sources if attack.gradients else 1) * len(trial.labels)
                    tasks[attack.name] = bar.add_task(f"{name}, {attack.name}", total=total, note="")
                bar.update(tasks[attack.name], advance=samples)

            return advance

        torch.set_flush_denormal(True)
        own = trial.run(student, {"float": student}, watch("float student", 1))
        if bar.disable:
            say(f"float student: {_percent(own.robust)} robust under its own gradients")
        verdicts: list[ArtifactVerdict] = []
        lines: list[dict[str, Any]] = []
        for one in found:
            try:
                subject = _subject(run, one, threads)
            except EdgekitError as error:
                if error.exit_code != ENVIRONMENT:
                    raise
                verdicts.append(verdict.not_run(**_about(run, one), why=str(error)))
                continue
            examined = examine(subject, student, own, trial, rules, watch)
            if bar.disable:
                seconds = sum(examined.outcome.seconds.values())
                say(f"{one.name}: {_percent(examined.outcome.robust)} robust ({seconds:.1f} s)")
            verdicts.append(examined.verdict)
            lines += _lines(one.name, trial, own, examined)
            if archive:
                archive(one.name, examined)
    if not lines:
        raise EdgekitError(f"nothing could run here ({verdicts[0].why})", exit_code=ENVIRONMENT)
    clean = own.clean.argmax(1) == trial.labels
    float_student = FloatStudent(
        verdict.accuracy(clean, rules.confidence), verdict.accuracy(own.robust, rules.confidence)
    )
    return _Results(verdicts, float_student), lines


def examine(
    subject: Subject,
    student: Classifier,
    own: Outcome,
    trial: Trial,
    rules: Rules,
    watch: Watch = lambda name, sources: lambda attack, samples: None,
) -> Examined:
    """Attack one file from every source that there is, and the float student from the same ones.

    Args:
        student: the float student, differentiable.
        own: what the student went through under its own gradients, as `trial.run` gives it.
        watch: the name of a judge and its number of sources -> what is told of the progress.
    Raises:
        EdgekitError: the file answers with numbers that are none.
    """
    judged = one_by_one_where_needed(subject.open(), trial.images)
    # The first session that ONNX Runtime opens in a process turns this off for the thread.
    torch.set_flush_denormal(True)
    sources: dict[str, Classifier] = {"float": student} | ({"twin": subject.twin} if subject.twin else {})
    outcome = trial.run(judged, sources, watch(subject.name, len(sources)))
    if not outcome.clean.isfinite().all():
        raise EdgekitError("the file answers with infinities, or with numbers that are none", where=subject.file)
    float_robust = own.robust
    following = tuple(attack for attack in trial.attacks if attack.gradients)
    if subject.twin and following:  # the other attacks follow no source: `own` holds all that they can do
        under_twin = replace(trial, attacks=following).run(
            student, {"twin": subject.twin}, watch(f"float student under {subject.name}'s twin", 1)
        )
        float_robust = float_robust & under_twin.robust
    opened_again = one_by_one_where_needed(subject.open(), trial.images)
    replayed = predict(opened_again, outcome.adversarial, CHUNK)
    outcome, replay_check = settle(outcome, replayed, trial.labels)
    checks = [replay_check, _same_answer(judged, outcome.clean, trial.images), _no_gain(float_robust, outcome, rules)]
    fidelity = None
    if subject.twin:
        fidelity = _fidelity(subject.twin, trial.images, outcome, replayed)
        why = f"the twin decides as the file does on {100 * fidelity.agreement:.2f} % of clean and adversarial images"
        checks.append(Check("twin_fidelity", fidelity.agreement >= FAITHFUL, fidelity.agreement, why))
    judgement = verdict.judged(
        rules,
        outcome.clean.argmax(1) == trial.labels,
        outcome.robust,
        **subject.about(),
        attacks=[_result(attack, outcome) for attack in trial.attacks],
        judged_on=subject.judged_on,
        float_clean_right=own.clean.argmax(1) == trial.labels,
        float_robust_right=float_robust,
        agreement=_share(own.clean.argmax(1) == outcome.clean.argmax(1)),
        twin=fidelity,
        checks=checks,
    )
    return Examined(judgement, outcome, float_robust)


def one_by_one_where_needed(judged: Classifier, images: Tensor) -> Classifier:
    """`judged`, asked one image at a time where its answers depend on the batch (dynamic quantization)."""
    probe = images[:16]
    alone, together = predict(judged, probe, 1), predict(judged, probe, len(probe))
    if _alike(alone, together).all():
        return judged
    return Wrapped(lambda batch: torch.cat([judged(image) for image in batch.split(1)]), differentiable=False)


def settle(outcome: Outcome, replayed: Tensor, labels: Tensor) -> tuple[Outcome, Check]:
    """Hold the outcome against the answers (N, K) that a freshly opened file gives to the adversarial images.

    A sample whose two highest logits are equal up to rounding may change sides with the batch that it sits in. There
    the replay, which others can repeat, decides. Any other difference fails the check.
    """
    fooled = replayed.argmax(1) != labels
    differs = fooled == outcome.robust
    others = replayed.scatter(1, labels[:, None], -torch.inf).amax(1)
    tied = (others - replayed.gather(1, labels[:, None])[:, 0]).abs() <= ROUNDING * replayed.abs().max()
    kept = _share(~differs)
    passed = bool((tied | ~differs).all())
    saved, lost = differs & tied & ~fooled, differs & tied & fooled
    if saved.any() or lost.any():
        hits = {pair: (hit & ~saved) | lost for pair, hit in outcome.fooled.items()}
        winner = outcome.winner.masked_fill(saved, -1).masked_fill(lost, 0)
        outcome = replace(outcome, fooled=hits, winner=winner)
    why = f"a freshly opened file repeats its answer to {100 * kept:.2f} % of the adversarial images"
    return outcome, Check("fooled_replayed", passed, kept, why)


def _alike(first: Tensor, second: Tensor) -> Tensor:
    """(N,) bool: the same decision, and the same logits (N, K) up to rounding."""
    room = ROUNDING * max(first.abs().max().item(), second.abs().max().item())
    return (first.argmax(1) == second.argmax(1)) & ((first - second).abs() <= room).all(1)


def _same_answer(judged: Classifier, clean: Tensor, images: Tensor) -> Check:
    """Whether the file says of the first chunk what it said before."""
    share = _share(_alike(predict(judged, images[:CHUNK], CHUNK), clean[:CHUNK]))
    why = f"{100 * share:.2f} % of {min(CHUNK, len(images))} images get the same answer when asked again"
    return Check("same_answer_twice", share == 1, share, why)


def _no_gain(float_robust: Tensor, outcome: Outcome, rules: Rules) -> Check:
    change = verdict.compare(float_robust, outcome.robust, rules.confidence)
    ends = f"{100 * change.low:+.1f} to {100 * change.high:+.1f}"
    why = f"robust accuracy changed by {100 * change.value:+.1f} points ({ends})"
    if change.low > 0:
        why += "; a file that gains so much hides its gradients until the contrary is shown"
    return Check("robust_accuracy_did_not_rise", change.low <= 0, change.value, why)


def _fidelity(copy: Classifier, images: Tensor, outcome: Outcome, replayed: Tensor) -> Twin:
    said = torch.cat([outcome.clean, replayed])
    copied = torch.cat([predict(copy, images, CHUNK), predict(copy, outcome.adversarial, CHUNK)])
    return Twin(_share(said.argmax(1) == copied.argmax(1)), (said - copied).abs().max().item())


def _result(attack: Attack, outcome: Outcome) -> AttackResult:
    by_source = {source: hit for (name, source), hit in outcome.fooled.items() if name == attack.name}
    worst = torch.stack(list(by_source.values())).any(0)
    sources = {source: _share(~hit) for source, hit in by_source.items()}
    return AttackResult(attack.name, _share(~worst), sources, outcome.seconds[attack.name])


def _share(right: Tensor) -> float:
    return int(right.sum()) / len(right)


def _percent(right: Tensor) -> str:
    return f"{100 * _share(right):.1f} %"


def _rules(tolerance: float, clean_tolerance: float, at_least: float | None) -> Rules:
    named = {"--tolerance": tolerance, "--clean-tolerance": clean_tolerance, "--at-least": at_least}
    for option, value in named.items():
        if value is not None and not 0 <= value <= 1:
            raise EdgekitError(f"should be between 0 and 100 points, not {100 * value:g}", where=option)
    return Rules(tolerance, clean_tolerance, at_least)


def _radius(epsilon: float | str) -> float:
    try:
        value = float(number(epsilon))
    except (ValueError, OverflowError):
        raise EdgekitError("should be a number or a fraction such as 8/255", where=f"--epsilon {epsilon}") from None
    if not 0 < value <= 1:
        mend = "Pixels go from 0 to 1; write 8/255 for eight of 255 levels" if value > 1 else None
        raise EdgekitError("an Linf epsilon is above 0 and at most 1", where=f"--epsilon {epsilon}", mend=mend)
    return value


def _found(what: str | Path | None) -> tuple[Run, list[Artifact]]:
    """The run and those of its artifacts that are meant, each checked against its digest and against the student."""
    path = None if what is None or Path(what) == runs.ROOT / "latest" else Path(what)
    if path is not None and not path.exists():
        raise EdgekitError("there is no such run or artifact", where=path)
    if path is not None and path.is_file():
        beside = (path.parent / "artifact.json").is_file()
        raise EdgekitError(
            "this version verifies the artifacts of a run, not a file by itself",
            where=path,
            mend=f"Run: edgekit verify {path.parent if beside else 'RUN'}",
        )
    if path is not None and (path / "artifact.json").is_file():
        folder = path.resolve()
        if folder.parent.name != "artifacts" or not (folder.parents[1] / "run.json").is_file():
            raise EdgekitError("this artifact lies in no run, and so has no student beside it", where=path)
        run, folders = runs.find(folder.parents[1]), [folder]
    else:
        run = runs.find(path)
        inside = sorted(run.artifacts.iterdir()) if run.artifacts.is_dir() else []
        folders = [folder for folder in inside if folder.is_dir() and not folder.name.startswith(".")]
    if not folders:
        mend = "Run: edgekit export" + ("" if path is None else f" {path}") + " --int8"
        raise EdgekitError("there is no exported file yet", where=run.folder, mend=mend)
    found = [artifacts.load(folder) for folder in folders]
    student, recipe = sha256(run.student), sha256(run.recipe_file)
    for one in found:
        if one.record.get("made_from", {}).get("student_sha256") != student:
            raise EdgekitError(
                "the file was exported from another student than the one beside it",
                where=one.folder,
                mend="Run: edgekit export --force",
            )
        if one.record["made_from"].get("recipe_sha256") != recipe:
            # Another split may hold training images as test images, and the data's digest does not see splits.
            raise EdgekitError("the recipe has changed since the export", where=run.recipe_file, mend="Train again")
    return run, found


def _same_data(run: Run, spec: Any) -> data.Dataset:
    dataset = data.load(spec)
    if dataset.sha256 != run.info()["data"]["sha256"]:
        # Another split may hold training images as test images.
        raise EdgekitError("the data has changed since the student was trained", where=dataset.name, mend="Train again")
    return dataset


def _about(run: Run, one: Artifact) -> dict[str, Any]:
    return {
        "name": one.name,
        "format": one.format,
        "precision": one.precision,
        "file": one.path.relative_to(run.folder).as_posix(),
        "bytes": one.bytes,
        "sha256": one.sha256,
    }


def _subject(run: Run, one: Artifact, threads: int) -> Subject:
    copy = twin.open(one.path) if (one.format, one.precision) == ("onnx", "int8") else None
    opener = partial(judge.open, one, threads=threads)
    opener()  # a missing runtime shows here, before anything is attacked
    return Subject(**_about(run, one), judged_on=judge.judged_on(one.format), open=opener, twin=copy)


def _looks(run: Run, digests: Sequence[str], data_sha256: str) -> int:
    """1 + how many verdicts this run holds already on one of these files and the same data."""
    most = 0
    earlier: list[Verdict] = []
    for path in sorted(run.verdicts.glob("*/verdict.json")):
        with contextlib.suppress(EdgekitError, ValueError, OSError):  # a damaged one cannot be counted
            earlier.append(verdict.from_dict(json.loads(path.read_text(encoding="utf-8")), where=path))
    for digest in digests:
        judged = [
            one
            for one in earlier
            if one.data.sha256 == data_sha256
            and any(file.sha256 == digest and file.verdict != "not_run" for file in one.artifacts)
        ]
        most = max(most, len(judged))
    return 1 + most


def _lines(name: str, trial: Trial, own: Outcome, examined: Examined) -> list[dict[str, Any]]:
    outcome = examined.outcome
    attacks, sources = outcome.won()
    columns = {
        "index": trial.index.tolist(),
        "label": trial.labels.tolist(),
        "float_clean": (own.clean.argmax(1) == trial.labels).tolist(),
        "float_robust": examined.float_robust.tolist(),
        "file_clean": (outcome.clean.argmax(1) == trial.labels).tolist(),
        "file_robust": outcome.robust.tolist(),
        "attack": attacks,
        "source": sources,
    }
    return [{"artifact": name, **dict(zip(columns, row, strict=True))} for row in zip(*columns.values(), strict=True)]


def _keep(run: Run, document: Verdict, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Write verdicts/<n>/; the verdict itself comes last, so that a folder with one is whole."""
    run.verdicts.mkdir(exist_ok=True)
    taken = 1
    while True:
        folder = run.verdicts / str(taken)
        try:  # mkdir, not exists(): two commands at once must not share a folder
            folder.mkdir()
            break
        except FileExistsError:
            taken += 1
    contents = verdict.to_dict(document)
    try:
        write_text(folder / "samples.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        write_json(folder / "verdict.json", contents)
    except BaseException:
        (folder / "samples.jsonl").unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise
    say(f"Kept in {folder}")
    return contents


@contextlib.contextmanager
def _archive(path: str | Path, trial: Trial) -> Iterator[Callable[[str, Examined], None]]:
    """An .npz file that grows by one artifact at a time, so that the images of all need not be held at once."""
    path = Path(path)
    if path.is_dir():
        raise EdgekitError("this is a folder, not a file", where=f"--save-adversarial {path}")
    with writing(path) as part, zipfile.ZipFile(part, "w") as archive:

        def put(name: str, value: Any) -> None:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                numpy.lib.format.write_array(file, numpy.asarray(value), allow_pickle=False)

        def add(name: str, examined: Examined) -> None:
            attacks, sources = examined.outcome.won()
            put(f"{name}/adversarial", examined.outcome.adversarial.numpy())
            put(f"{name}/fooled", ~examined.outcome.robust.numpy())
            put(f"{name}/attack", numpy.array(attacks, dtype=str))
            put(f"{name}/source", numpy.array(sources, dtype=str))

        put("images", trial.images.numpy())
        put("labels", trial.labels.numpy())
        put("index", trial.index.numpy())
        yield add


@contextlib.contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
