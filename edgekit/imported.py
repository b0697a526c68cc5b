"""A network trained elsewhere as a run of its own: what `export --weights FILE` begins with.

The run is laid out as distill leaves one (CLI.md): recipe.toml with the data and the architecture, student.safetensors,
and run.json, whose status is "imported". Everything that follows, verify above all, then works as on a trained student.
Nothing about the network is guessed: what neither the file nor an option says is asked for.
"""

import io
import json
import pickle
import re
import struct
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

import edgekit
from edgekit import data, foreign, machine, models, runs
from edgekit.classifier import predict
from edgekit.console import say
from edgekit.data import Dataset
from edgekit.errors import EdgekitError
from edgekit.files import digest, sha256, write_text
from edgekit.foreign import Said
from edgekit.models import Network
from edgekit.recipe import Recipe, Student, resolve, to_toml
from edgekit.runs import Run

STATUS = "imported"
_ABOVE = "# Trained elsewhere: [method] and [train] say what export --qat goes on with, not what was done before.\n\n"
CHECKED = 1000  # validation images at most
_UNPICKLED = (".pt", ".pth", ".bin", ".ckpt")
_WRAPPERS = ("module.", "_orig_mod.", "model.")  # what DataParallel, torch.compile and Lightning put before each name
_NESTED = ("state_dict", "model_state_dict", "model")  # where a checkpoint holds more than weights
# What torch's restricted unpickler says of files that are none of its own.
_UNREADABLE = (pickle.UnpicklingError, RuntimeError, ValueError, LookupError, EOFError, TypeError, AttributeError)


@dataclass(frozen=True)
class Given:
    """What is said of a network trained elsewhere, each None where nothing was said.

    Attributes:
        weights: the file: safetensors, or a state_dict that torch.save wrote.
        model: an architecture of edgekit/models, or your own "module:factory".
        data: as a recipe's data.name: digits, cifar10, cifar100, or a folder of photos.
        size: the side to which these are cropped and resized.
        mean, std: as foreign.Said; of the images that the network eats.
        classes: a file with the network's class names, in the order of its outputs.
        overrides: of the recipe that stands for the training, such as "student.width=0.5" or "inner.epsilon=4/255".
    """

    weights: Path
    model: str | None = None
    data: str | None = None
    size: int | None = None
    mean: str | None = None
    std: str | None = None
    classes: Path | None = None
    overrides: tuple[str, ...] = ()


def bring(given: Given) -> Run:
    """The run of this network: a new one, runs/<name of the file>-<n>, or the one that was made of the same before.

    runs/latest names it afterwards.

    Raises:
        EdgekitError: the file cannot be read, or the network, the data and the options do not fit each other.
    """
    state, about = _read(given.weights)
    plan = _plan(given, about)
    dataset = data.load(plan.data)
    _same_classes(given, about, dataset)
    network = _network(given, plan, about, state, dataset)
    stem = re.sub(r"[^\w.-]+", "-", given.weights.stem) or "network"
    if (run := _there(stem, network, plan, dataset)) is None:
        run = _made(stem, network, plan, dataset, given)
    runs.set_latest(run)
    return run


# The file -------------------------------------------------------------------------------------------------------------


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Its tensors by name, and what edgekit wrote beside them, where it did."""
    where = f"--weights {path}"
    if not path.is_file():
        raise EdgekitError("there is no such file", where=where)
    about: dict[str, Any] = {}
    if path.suffix == ".safetensors":
        try:
            with safetensors.safe_open(path, "pt") as file:
                metadata: dict[str, str] = file.metadata() or {}
                found: Any = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except safetensors.SafetensorError:
            raise EdgekitError("not a valid safetensors file", where=where) from None
        try:
            about = json.loads(metadata.get("edgekit", "{}"))
            Student.model_validate(about["student"]) if about else None
        except (ValueError, KeyError, TypeError):
            raise EdgekitError("its metadata does not say which student it holds", where=where) from None
    elif path.suffix in _UNPICKLED:
        mend = "Save weights alone: torch.save(model.state_dict(), FILE)"
        try:
            with warnings.catch_warnings():  # of TorchScript, before it is refused
                warnings.simplefilter("ignore")
                found = torch.load(io.BytesIO(path.read_bytes()), map_location="cpu", weights_only=True)
        except (*_UNREADABLE, struct.error) as error:
            if machine.out_of_memory(error):
                raise
            raise EdgekitError(
                "holds no weights that can be read without running its code", where=where, mend=mend
            ) from None
        for key in _NESTED:
            if isinstance(found, dict) and isinstance(found.get(key), dict):
                found = found[key]
        if not isinstance(found, dict):
            raise EdgekitError(f"holds a {type(found).__name__}, not weights by name", where=where, mend=mend)
    else:
        mend = f"Known: .safetensors, {', '.join(_UNPICKLED)}"
        raise EdgekitError("no file of weights that edgekit reads", where=where, mend=mend)
    state = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
    if not state:
        raise EdgekitError("there are no tensors in it", where=where)
    return state, about


def _bare(state: dict[str, Tensor], asked: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same without what wrappers put before all names, until some are those of the architecture."""
    known = {*asked, *(f"body.{name}" for name in asked)}
    for prefix in _WRAPPERS:
        if known.isdisjoint(state) and all(name.startswith(prefix) for name in state):
            return _bare({name.removeprefix(prefix): value for name, value in state.items()}, asked)
    return state


# What it is -----------------------------------------------------------------------------------------------------------


def _plan(given: Given, about: Mapping[str, Any]) -> Recipe:
    """The recipe that stands for the training elsewhere: the student and its data; the rest says how it is attacked."""
    student: dict[str, Any] = dict(about.get("student", {}))
    model = given.model or student.get("architecture")
    where = f"--weights {given.weights}"
    if model is None:
        known = ", ".join(models.ARCHITECTURES)
        what = "the file does not say which architecture it is of"
        raise EdgekitError(what, where=where, mend=f"Say --model: {known}, or your own module:factory")
    if student and model != student["architecture"]:
        what = f"the file says that it holds the architecture '{student['architecture']}'"
        raise EdgekitError(what, where=f"--model {given.model}", mend="Leave it out")
    if ":" in model and given.model is None:
        what = f"the file asks to import '{model}', which is done only where you name it"
        raise EdgekitError(what, where=where, mend=f"If you trust it: --model {model}")
    if given.data is None:
        what = "an export needs images: to calibrate, to compare and to attack"
        raise EdgekitError(what, where=where, mend="Say --data FOLDER, digits, cifar10 or cifar100")
    images: dict[str, Any] = {"name": given.data}
    if given.size is not None:
        images["size"] = given.size
    # What `--qat` trains further with, unless --set says otherwise: adversarial training asks for no teacher.
    document = {"student": student | {"architecture": model}, "data": images, "method": {"name": "sat"}}
    typed = {("student", "architecture"): f"--model {model}", ("data", "size"): f"--size {given.size}"}
    return resolve(document, given.overrides, typed)


def _listed(given: Given, about: Mapping[str, Any], key: str, kind: type) -> tuple[Any, ...]:
    """What the file's metadata list under a key; () where they have none.

    Raises:
        EdgekitError: it is no such list.
    """
    value = about.get(key, ())
    if not isinstance(value, list | tuple) or not all(isinstance(one, kind) for one in value):
        raise EdgekitError(f"its metadata '{key}' is no list of {kind.__name__}", where=f"--weights {given.weights}")
    return tuple(value)


def _same_classes(given: Given, about: Mapping[str, Any], dataset: Dataset) -> None:
    """Refuse data whose classes are, or stand, otherwise than those that the network answers."""
    names = foreign.class_names(given.classes, {})
    where = f"--classes {given.classes}"
    if "classes" in about:
        inside = _listed(given, about, "classes", str)
        if names is not None and names != inside:
            raise EdgekitError("the file itself names other classes", where=where, mend="Leave it out")
        names, where = inside, f"--weights {given.weights}"
    if names is None or names == dataset.classes:
        return
    if len(names) != len(dataset.classes):
        what = f"the network knows {len(names)} classes, the data has {len(dataset.classes)}"
    elif set(names) == set(dataset.classes):
        first = next(place for place, name in enumerate(names) if name != dataset.classes[place])
        what = (
            f"the network's classes stand in another order than the data's, which are sorted by name: its output "
            f"{first} is '{names[first]}', not '{dataset.classes[first]}'"
        )
    else:
        missing = next(name for name in names if name not in dataset.classes)
        what = f"the network's class '{missing}' is none of the data's"
    raise EdgekitError(what, where=where, mend="Rename the folders of the data, or name other data")


def _network(
    given: Given, plan: Recipe, about: Mapping[str, Any], state: dict[str, Tensor], dataset: Dataset
) -> Network:
    """The architecture with the weights of the file in it."""
    where, model = f"--weights {given.weights}", plan.student.architecture
    if (shape := _listed(given, about, "input_shape", int) or dataset.input_shape) != dataset.input_shape:
        what = f"the network takes images of {_shape(shape)}, the data has {_shape(dataset.input_shape)}"
        raise EdgekitError(
            what, where=where, mend=f"Say --size {shape[-1]}" if shape[0] == dataset.input_shape[0] else None
        )
    channels = dataset.input_shape[0]
    network = models.build(
        plan.student, dataset.classes, dataset.input_shape, [0.0] * channels, [1.0] * channels
    ).eval()
    asked = network.body.state_dict()
    state = _bare(state, asked)
    for buffer, values in zip((network.mean, network.std), _normalization(given, state, channels), strict=True):
        buffer.copy_(torch.tensor(values).view_as(buffer))
    # edgekit's own files hold the network with its normalization, others what is its body here.
    inside = {name.removeprefix("body."): value for name, value in state.items() if name.startswith("body.")}
    own = {name: value for name, value in (inside or state).items() if name not in ("mean", "std")}
    _fits(asked, own, dataset, model, where)
    counted = {name: asked[name] for name in asked if _counter(name)}  # of batches seen: nothing is computed with it
    network.body.load_state_dict(counted | {name: value.to(asked[name].dtype) for name, value in own.items()})
    return network


def _normalization(given: Given, state: Mapping[str, Tensor], channels: int) -> tuple[Sequence[float], Sequence[float]]:
    inside = "mean" in state and "std" in state
    if inside and (given.mean is not None or given.std is not None):
        what = "the file says itself how its images are normalized"
        raise EdgekitError(what, where="--mean" if given.mean is not None else "--std", mend="Leave it out")
    if inside:
        mean, std = (state[name].flatten().float().tolist() for name in ("mean", "std"))
        if len(mean) != channels or len(std) != channels:
            what = f"it normalizes {len(mean)} channels, the data has {channels}"
            raise EdgekitError(what, where=f"--weights {given.weights}")
        return mean, std
    if given.mean is None or given.std is None:
        missing = "--mean" if given.mean is None else "--std"
        what = "how its images were normalized in training is not said"
        mend = f"Say {missing}, in units of [0, 1]; --mean 0 --std 1 where they were not"
        raise EdgekitError(what, where=f"--weights {given.weights}", mend=mend)
    mean, std = foreign.normalization(Said(mean=given.mean, std=given.std), {}, channels, given.weights)
    return mean or [0.0] * channels, std or [1.0] * channels


def _counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def _fits(asked: Mapping[str, Tensor], own: Mapping[str, Tensor], dataset: Dataset, model: str, where: str) -> None:
    """Refuse weights that are not this architecture's, whole, and finite."""
    other = "Say another --model, or --set student.form=…, student.width=…, student.depth=…"
    missing = [name for name in asked if name not in own and not _counter(name)]
    if missing:
        what = f"lacks {len(missing)} of the {len(asked)} tensors of {model}, the first '{missing[0]}'"
        raise EdgekitError(what, where=where, mend=other)
    if unknown := [name for name in own if name not in asked]:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        what = f"holds what {model} has not: '{unknown[0]}'{more}"
        raise EdgekitError(what, where=where, mend=other)
    for name, value in own.items():
        expected = asked[name]
        if value.shape != expected.shape:
            classes = len(dataset.classes)
            if expected.shape[:1] == (classes,) and value.shape[1:] == expected.shape[1:]:
                what = f"the network answers {len(value)} classes ('{name}'), the data has {classes}"
                raise EdgekitError(what, where=where, mend="Name the data that it was trained for")
            what = f"'{name}' is {_shape(value.shape)}, and {_shape(expected.shape)} in {model} as asked for"
            raise EdgekitError(what, where=where, mend=other)
        if expected.is_floating_point() and not value.is_floating_point():
            what = f"'{name}' holds {str(value.dtype).removeprefix('torch.')}, no floats"
            raise EdgekitError(what, where=where, mend="Export the float network: edgekit quantizes it")
        if value.is_floating_point() and not value.isfinite().all():
            raise EdgekitError(f"'{name}' holds infinite values or no numbers", where=where, mend="Train it again")


def _shape(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes)) or "one number"


# The run --------------------------------------------------------------------------------------------------------------


def _identity(network: Network, recipe: str) -> str:
    parts = [value.contiguous().numpy().tobytes() for value in network.state_dict().values()]
    return digest(recipe, *network.state_dict(), *parts)


def _there(stem: str, network: Network, plan: Recipe, dataset: Dataset) -> Run | None:
    """The run that was made of the same weights, recipe and data."""
    identity = _identity(network, to_toml(plan))
    for folder in sorted(runs.ROOT.glob(f"{stem}-*")):
        run = Run(folder)
        info = run.info()
        if info.get("identity") == identity and info.get("data", {}).get("sha256") == dataset.sha256:
            say(f"{run.folder}: made of these weights already")
            return run
    return None


def _made(stem: str, network: Network, plan: Recipe, dataset: Dataset, given: Given) -> Run:
    validation = dataset.validation[data.stratified(dataset.validation.labels, CHECKED, 0)]
    right = predict(network, validation.floats()).argmax(1) == validation.labels
    accuracy = right.double().mean().item()
    run = runs.create(stem, None)
    write_text(run.recipe_file, _ABOVE + to_toml(plan))
    models.save(network, run.student)
    info = {
        "schema": 1,
        "status": STATUS,
        "seed": plan.seed,
        "threads": 1,
        "weights": {"file": given.weights.name, "sha256": sha256(given.weights)},
        "identity": _identity(network, to_toml(plan)),
        "versions": {"edgekit": edgekit.__version__, "torch": str(torch.__version__)},
        "data": {"name": dataset.name, "sha256": dataset.sha256},
        "teacher": None,
        "metrics": {"clean_accuracy": accuracy, "split": "validation"},
        "student_sha256": sha256(run.student),
    }
    run.save_info(info)  # last: a run counts as begun once it is there
    say(
        f"{run.folder}: {given.weights.name} as {plan.student.architecture}; {100 * accuracy:.1f} % of {len(right)} "
        f"validation images of {dataset.name} are classified right"
    )
    if accuracy < 2 / len(dataset.classes):
        say(
            "That is little more than chance: see whether --mean and --std, the order of the classes (sorted by name) "
            "and the size of the images are those of the training"
        )
    say(f"A verdict on it holds only where no test image of {dataset.name} was trained on; that is not known here")
    return run
