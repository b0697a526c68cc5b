"""What is to be judged: the artifacts of a run, or one file of anyone's, with its images and the models beside it."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from edgekit import artifact as artifacts
from edgekit import foreign, machine, models, places, runs, saturation, script, twin, verdict
from edgekit import judge as judges
from edgekit.artifact import Artifact
from edgekit.attacks.campaign import SCORES, TOGETHER
from edgekit.classifier import Classifier, Wrapped
from edgekit.console import say
from edgekit.data import Dataset, Split, stratified
from edgekit.data import load as load_data
from edgekit.errors import EdgekitError
from edgekit.examine import Subject
from edgekit.files import sha256
from edgekit.foreign import Said
from edgekit.judge import Remote
from edgekit.models import Network
from edgekit.models.fold import fold
from edgekit.recipe import read
from edgekit.runs import Run

SAMPLES = 1000
EVERY = 2**31 - 1  # as a number of samples: all that there are
SPLIT = "test"
PROBED = 8  # images by which a judge's probabilities are recognised
OWN_VERDICTS = Path("edgekit-verdicts")  # of files that belong to no run


@dataclass(frozen=True)
class Entry:
    """One file to be judged: what the verdict says of it, and how it is opened once its turn comes."""

    about: dict[str, Any]
    subject: Callable[[], Subject]


@dataclass(frozen=True)
class Assignment:
    """All that is to be judged, on which images, beside which student, and where the verdict is kept.

    `classes` are their names where they are known, in the order of the scores; `facts` are further digests, by name.
    """

    entries: list[Entry]
    split: Split
    data: verdict.Data
    epsilon: float
    threads: int
    verdicts: Path
    student: Classifier | None = None
    classes: tuple[str, ...] | None = None
    facts: dict[str, str] = field(default_factory=dict)
    processors: tuple[str, ...] | None = None  # those of --on
    port: foreign.Port | None = None  # how a file of no run is fed and read


def _of_run(
    path: Path | None,
    samples: int | None,
    seed: int,
    radius: float | None,
    on: Sequence[str] | None,
    *,
    local: bool = True,
) -> Assignment:
    """The artifacts of a run, or one of them, on the run's own test images; `local`: opened on this machine."""
    run, found = _found(path)
    recipe = read(run.recipe_file)
    dataset = _same_data(run, recipe.data)
    split = dataset.test[stratified(dataset.test.labels, samples or SAMPLES, seed)]
    _few(split, samples)
    threads = min(run.info().get("threads", 1), machine.cores())
    student = attackable(models.load(run.student, factory=recipe.student.architecture))
    return Assignment(
        entries=[
            Entry(_about(run, one), partial(_subject, run, one, threads, 1 / len(student.classes), on, local=local))
            for one in found
        ],
        split=split,
        data=verdict.Data(dataset.name, SPLIT, dataset.sha256),
        epsilon=recipe.inner.epsilon if radius is None else radius,
        threads=threads,
        verdicts=run.verdicts,
        student=student,
        classes=student.classes,
        facts={"student sha256": sha256(run.student), "recipe sha256": sha256(run.recipe_file)},
    )


def _of_file(
    path: Path,
    folder: Path | None,
    said: Said,
    samples: int | None,
    seed: int,
    radius: float | None,
    on: Sequence[str] | None,
    remote: Callable[[], Remote] | None = None,
) -> Assignment:
    """A file that belongs to no run, on a folder of photos; `remote` answers in its place."""
    if path.suffix in script.SUFFIXES:
        return _of_script(path, folder, said, samples, seed, radius)
    model = foreign.read(path)
    port = foreign.port(path, model, said)
    if folder is None:
        raise EdgekitError(
            "this file belongs to no run: it needs photos to be judged on", where=path, mend="Say --data FOLDER"
        )
    opened = partial(judges.open, path, threads=machine.cores(), output=port.output)
    classes = port.classes
    if classes is None and remote is not None:  # the device says it: here the file need not open at all
        classes = foreign.count_classes(
            path, replace(port, mean=None, layout="nchw", bgr=False, element="float32"), remote(), said
        )
    classes = classes or foreign.count_classes(path, port, opened(), said)
    photos = foreign.photos(folder, port, classes, said, samples or SAMPLES, seed)
    _few(photos.split, samples)
    threads = machine.cores()
    about = {
        "name": path.stem,
        "format": "onnx",
        "precision": foreign.precision(model),
        "file": path.name,
        "bytes": path.stat().st_size,
        "sha256": foreign.fingerprint(path, foreign.external(model)),
    }

    def subject() -> Subject:
        copy = foreign.twin(path, port)
        wrap = lambda raw: foreign.Ported(port, raw, differentiable=False)  # noqa: E731
        return Subject(
            **about,
            **_numbers(path, model, port.output, wrap, threads, on),
            judged_on=judges.judged_on("onnx"),
            open=lambda: foreign.Ported(port, opened(), differentiable=False),
            twin=copy,
            chance=1 / classes,
        )

    return Assignment(
        entries=[Entry(about, subject)],
        split=photos.split,
        data=verdict.Data(photos.name, SPLIT, photos.sha256),
        epsilon=8 / 255 if radius is None else radius,
        threads=threads,
        verdicts=OWN_VERDICTS,
        classes=port.names,
        port=port,
    )


def _of_script(
    path: Path, folder: Path | None, said: Said, samples: int | None, seed: int, radius: float | None
) -> Assignment:
    """A TorchScript file that belongs to no run, once its user trusts it."""
    read, threads = script.archive(path), machine.cores()
    if folder is None and said.trust_file:
        raise EdgekitError(
            "this file belongs to no run: it needs photos to be judged on", where=path, mend="Say --data FOLDER"
        )
    module = script.opened(path, read, said, folder or Path(), threads)
    port, classes = module.port, module.classes
    photos = foreign.photos(folder or Path(), port, classes, said, samples or SAMPLES, seed)
    _few(photos.split, samples)
    about = {
        "name": path.stem,
        "format": "torchscript",
        "precision": read.precision,
        "file": path.name,
        "bytes": path.stat().st_size,
        "sha256": sha256(path),
    }

    def subject() -> Subject:
        own = None if read.lite else script.gradients(path, port, photos.split[:2].floats())
        note = "TorchScript is code, and the file's ran here (--trust-file)"
        return Subject(
            **about,
            judged_on=judges.judged_on("torchscript"),
            open=lambda: foreign.Ported(port, module.open(), differentiable=False),
            twin=own,
            called="file",
            chance=1 / classes,
            code_ran=True,
            note=note + ("" if own else "; no gradients pass through the file itself"),
        )

    return Assignment(
        entries=[Entry(about, subject)],
        split=photos.split,
        data=verdict.Data(photos.name, SPLIT, photos.sha256),
        epsilon=8 / 255 if radius is None else radius,
        threads=threads,
        verdicts=OWN_VERDICTS,
        classes=port.names,
        port=port,
    )


def attackable(network: Network) -> Network:
    """The same answers in less time: no gradients of weights, no batch normalization, and the layout that halves the
    time of a convolution's two passes on a CPU."""
    return fold(network.requires_grad_(False).to(memory_format=torch.channels_last))


def _few(split: Split, samples: int | None) -> None:
    if samples is not None and len(split) < samples < EVERY:
        say(f"There are {len(split):,} test images; all of them are drawn.")


def surrogate(path: Path, assignment: Assignment) -> dict[str, Classifier]:
    """The model of --source by its file's name: another network whose gradients the attacks follow too.

    A file called float.onnx must not take the place of the float student, nor twin.onnx that of the twin.
    """
    if path.suffix == ".safetensors":
        network = attackable(models.load(path))
    else:
        model = foreign.read(path)
        port = foreign.port(path, model, Said())
        network = foreign.twin(path, port)
        if network is None:
            raise EdgekitError("no gradients go through this file", where=f"--source {path}")
    images = assignment.split.images[:2].float() / 255
    try:
        with torch.no_grad():
            network(images)
    except RuntimeError as error:
        raise EdgekitError(
            f"does not take these images ({str(error).splitlines()[0][:120]})", where=f"--source {path}"
        ) from None
    name = path.stem.replace(TOGETHER, "-")
    return {path.name if name in ("float", "twin", "file", SCORES) else name: network}


def assign(
    what: str | Path | None,
    data: Path | None,
    said: Said,
    samples: int | None,
    seed: int,
    radius: float | None,
    judge: str | None,
    on: Sequence[str] | None = None,
) -> Assignment:
    """What `verify WHAT` means: a run, one of its artifacts, or a file that belongs to none.

    Args:
        what, data, said, samples, seed, judge: as verifier.verify explains them.
        radius: the epsilon that was asked for; None for the run's own.
        on: the processors of --on, set up already; None where nothing was said.
    Raises:
        EdgekitError: there is nothing to judge, or options that the thing to judge has no use for.
    """
    path = None if what is None else Path(what)
    if path is not None and data is not None and (path / "artifact.json").is_file():
        path = artifacts.load(path).path  # an artifact away from its run is a file like any other
    if path is not None and data is not None and not path.exists():
        raise EdgekitError("there is no such file", where=path)
    remote = None if judge is None else functools.cache(partial(judges.connect, judge))
    if path is not None and path.is_file() and (data is not None or not (path.parent / "artifact.json").is_file()):
        found = _of_file(path, data, said, samples, seed, radius, on, remote)
    elif given := [*(["--data"] if data is not None else []), *said.options()]:
        raise EdgekitError("is for a file that belongs to no run; a run has its own data", where=given[0])
    else:
        found = _of_run(path, samples, seed, radius, on, local=remote is None)
    found = replace(found, processors=None if on is None else tuple(on))
    return found if remote is None else _judged_by(found, f"judge {judge}", remote)


def _judged_by(assignment: Assignment, called: str, remote: Callable[[], Remote]) -> Assignment:
    """The same with one file's answers taken from a program or device."""
    if len(assignment.entries) != 1:
        names = ", ".join(entry.about["name"] for entry in assignment.entries)
        mend = "Name the artifact whose file runs there"
        raise EdgekitError(f"one judge answers for one file, not for {names}", where="--judge", mend=mend)
    (entry,) = assignment.entries
    asked = _scored(assignment, remote())

    def subject() -> Subject:
        # One conversation: a device may take no second one, so the replay asks the same judge again.
        return replace(entry.subject(), judged_on=called, open=lambda: asked, others=())

    return replace(assignment, entries=[Entry(entry.about, subject)])


def _scored(assignment: Assignment, remote: Remote) -> Classifier:
    """The judge; where its file ends in a softmax and it answers probabilities, their logarithms are the scores.

    Raises:
        EdgekitError: it answers another number of scores than the file has.
    """
    port = assignment.port
    if port is None:
        return remote
    answers = remote(assignment.split[:PROBED].floats())
    if port.classes not in (None, answers.shape[1]):
        raise EdgekitError(f"the judge answers {answers.shape[1]} scores, the file {port.classes}", where="--judge")
    if not port.probabilities:
        return remote
    sums = answers.sum(1)
    # A device's softmax may be of 8 or 16 bits, so that a sum is 1 only about.
    if not (bool((answers >= 0).all()) and bool(((sums - 1).abs() < 0.05).all())):
        say("The file ends in a softmax, and the judge answers no probabilities: they are taken as scores")
        return remote
    say("The file ends in a softmax: the logarithms of the judge's probabilities are its scores")
    return Wrapped(lambda images: port.scores(remote(images)), differentiable=False)


def _found(path: Path | None) -> tuple[Run, list[Artifact]]:
    """The run and those of its artifacts that are meant, each checked against its digest and against the student."""
    path = None if path == runs.ROOT / "latest" else path
    if path is not None and not path.exists():
        raise EdgekitError("there is no such run or artifact", where=path)
    if path is not None and (path / "Manifest.json").is_file():  # a Core ML package is a folder
        path = path.parent
    if path is not None and path.is_file():  # a file of an artifact is that artifact
        judged = artifacts.load(path.parent).path
        if path.name != judged.name:
            say(f"{path.name} is {judged.name} for another loader; {judged.name} is judged")
        path = path.parent
    if path is not None and (path / "artifact.json").is_file():
        folder = path.resolve()
        if folder.parent.name != "artifacts" or not (folder.parents[1] / "run.json").is_file():
            raise EdgekitError(
                "this artifact lies in no run, and so has no student and no data beside it",
                where=path,
                mend="Say --data FOLDER",
            )
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


def _same_data(run: Run, spec: Any) -> Dataset:
    dataset = load_data(spec)
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


def _subject(run: Run, one: Artifact, threads: int, chance: float, on: Sequence[str] | None, *, local: bool) -> Subject:
    copy = None if one.graph is None else twin.open(one.graph)
    opener = partial(judges.open, one, threads=threads)
    first = [opener()] if local else []  # a missing runtime shows here, before anything is attacked
    opened = lambda: first.pop() if first else opener()  # noqa: E731
    more: dict[str, Any]
    if one.graph == one.path:
        more = _numbers(one.path, foreign.read(one.path), None, lambda raw: raw, threads, on)
    else:
        more = {"others": places.asked_for(on or (), one.path, one.format, lambda raw: raw)}
    return Subject(
        **_about(run, one), **more, judged_on=judges.judged_on(one.format), open=opened, twin=copy, chance=chance
    )


def _numbers(
    path: Path, model: Any, output: str | None, wrap: places.Wrap, threads: int, on: Sequence[str] | None
) -> dict[str, Any]:
    """What a Subject has of an ONNX file's numbers: where else it is judged, how coarse an int8 file's scores are."""
    if foreign.precision(model) != "int8":
        return {"others": places.asked_for(on or (), path, "onnx", wrap, output)}
    pairs = sum(saturation.unsafe_pairs(model).values())
    if on is not None:
        others = places.asked_for(on, path, "onnx", wrap, output)
    else:
        others = places.both_arithmetics(path, wrap, output, threads) if pairs else ()
    quantum = saturation.quantum(model, output or model.graph.output[0].name)
    return {"others": others, "saturating_pairs": pairs, "quantum": quantum}
