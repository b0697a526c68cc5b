"""recipes/*.toml -> a validated, frozen Recipe. Every fault is one sentence with its file, line, key and mend."""

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from edgekit import shipped
from edgekit.errors import EdgekitError, nearest


def number(value: Any) -> Any:
    """A number, or a fraction such as "8/255", as a float; anything else is left for pydantic to refuse."""
    if not isinstance(value, str):
        return value
    above, slash, below = value.partition("/")
    try:
        if slash:
            return float(above) / float(below)
    except (ValueError, ZeroDivisionError):
        pass
    raise ValueError("should be a number or a fraction such as '8/255'")  # pydantic says which key


def typed(text: str | float) -> float:
    """A number as people type it: "0.5", "8/255", or a number already.

    Raises:
        ValueError: it is none.
    """
    return float(number(text)) if isinstance(text, str) and "/" in text else float(text)


Number = Annotated[float, BeforeValidator(number)]
Pixels = Annotated[Number, Field(gt=0, le=1, allow_inf_nan=False)]  # in units of the [0, 1] range
Fraction = Annotated[Number, Field(ge=0, lt=1)]  # of the run, or of a split
List = Field(strict=False)  # TOML has lists where the recipe has tuples; their items stay strict


class Table(BaseModel):
    """One table of a recipe."""

    # Strict: "5", true and 5.0 are no whole numbers, in TOML as in Python.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)


class Student(Table):
    architecture: str  # mobilenetv2, resnet18, wideresnet, or your own "module:factory"
    form: Literal["cifar", "imagenet"] = "cifar"
    width: float = Field(default=1.0, gt=0, le=64)  # times the paper's channels; no known network comes near the limit
    depth: int = Field(default=28, ge=10, le=1000)  # wideresnet only
    strides: Annotated[tuple[int, ...], List] | None = None  # mobilenetv2: one per stage
    options: dict[str, Any] = {}  # handed to your own factory


class Data(Table):
    name: str  # digits, cifar10, cifar100, or a folder
    root: str | None = None  # where torchvision's archive of cifar10 or cifar100 lies or is downloaded to
    size: int | None = Field(default=None, ge=4)  # pixels; photos are resized and centre-cropped to a square
    validation: Annotated[Number, Field(gt=0, lt=0.5)] = 0.1  # of the training images; chooses the checkpoint
    calibration: int = Field(default=256, ge=1)  # images set aside for quantization
    split_seed: int = 0
    pad: int = Field(default=4, ge=0)  # augmentation: random crops out of the padded image
    flip: bool = True  # augmentation: mirrored, every second time


class Teacher(Table):
    recipe: str | None = None  # trained by that recipe at first use, then cached
    weights: str | None = None  # a student.safetensors of an earlier run
    factory: str | None = None  # your own "module:function", where these weights need it: no file may name it by itself

    @model_validator(mode="after")
    def _one(self) -> "Teacher":
        if (self.recipe is None) == (self.weights is None):
            raise ValueError("should have exactly one of the keys 'recipe' and 'weights'")
        return self


class Method(Table):
    name: str
    robust_weight: Annotated[Number, Field(ge=0, le=1)] = 5 / 6  # rslad: share of the adversarial term
    beta: float = Field(default=6.0, ge=0)  # trades: weight of the robust term
    scale: float = Field(default=1.0, gt=0)  # rslad: times 10 for CIFAR-100, as the mean over classes shrinks


class Inner(Table):
    epsilon: Pixels = 8 / 255
    step_size: Pixels = 2 / 255
    steps: int = Field(default=10, ge=1)


class Train(Table):
    epochs: int = Field(default=300, ge=1)
    batch_size: int = Field(default=128, ge=2)
    learning_rate: float = Field(default=0.1, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=2e-4, ge=0)
    schedule: Literal["multistep", "cosine"] = "multistep"
    milestones: Annotated[tuple[Fraction, ...], List] = (215 / 300, 260 / 300, 285 / 300)  # fractions of the run
    gamma: float = Field(default=0.1, gt=0, le=1)
    warmup: Fraction = 0.0  # fraction of the run
    gradient_clip: float = Field(default=0.0, ge=0)  # largest gradient norm; 0 is off
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = True


class Evaluate(Table):
    steps: int = Field(default=10, ge=1)  # of the PGD that chooses the checkpoint
    samples: int = Field(default=1000, ge=1)  # validation images at most
    every: int = Field(default=1, ge=1)  # epochs


class Qat(Table):
    epochs: int = Field(default=2, ge=1)
    learning_rate: float = Field(default=0.003, gt=0)  # the first; half a cosine leads down to 0
    soft_labels: Literal["student", "teacher"] = "student"  # whose: the float student's, or those of the run's teacher
    frozen_after: Annotated[Number, Field(ge=0, le=1)] = 0.5  # fraction of the run in which ranges are measured anew


class Recipe(Table):
    student: Student
    data: Data
    method: Method
    teacher: Teacher | None = None
    inner: Inner = Inner()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    qat: Qat = Qat()
    seed: int = Field(default=0, ge=0, lt=2**31)

    @model_validator(mode="before")
    @classmethod
    def _short(cls, document: Any) -> Any:
        """`student = "resnet18"` says the same as a table with that one key."""
        if isinstance(document, dict):
            document = dict(document)
            for table, key in (
                ("student", "architecture"),
                ("data", "name"),
                ("method", "name"),
                ("teacher", "weights"),
            ):
                if isinstance(value := document.get(table), str):
                    key = "recipe" if table == "teacher" and value.endswith(".toml") else key
                    document[table] = {key: value}
        return document


def read(path: str | Path, overrides: Iterable[str] = (), seed: int | None = None) -> Recipe:
    """The recipe in `path` (or the shipped one of that name), with `--set` overrides such as "train.epochs=5".

    Raises:
        EdgekitError: no such file, not TOML, or a key that is unknown, of the wrong type or out of range.
    """
    text, document = parse(shipped.find(path, "recipes"), path)
    origin = _override(document, overrides)
    if seed is not None:
        document["seed"] = seed
        origin[("seed",)] = f"--seed {seed}"
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        raise sentence(error, path, text, origin) from None


def resolve(document: dict[str, Any], overrides: Iterable[str], origin: Mapping[tuple[str, ...], str]) -> Recipe:
    """A recipe that stands in no file, with overrides; `origin` names the options that its other keys come from.

    Raises:
        EdgekitError: a key that is unknown, of the wrong type or out of range.
    """
    named = {**origin, **_override(document, overrides)}
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        raise sentence(error, "--set", "", named) from None


def _override(document: dict[str, Any], overrides: Iterable[str]) -> dict[tuple[str, ...], str]:
    """Put overrides into the document; where each of these keys comes from, for people."""
    origin: dict[tuple[str, ...], str] = {}
    for override in overrides:
        key, value = split_override(override)
        _place(document, key, value, override)
        origin[key] = f"--set {override}"
    return origin


def parse(file: Path, path: str | Path) -> tuple[str, dict[str, Any]]:
    """The text of a TOML file and what it says; `path` is the file as it was typed.

    Raises:
        EdgekitError: it is not TOML.
    """
    try:
        text = file.read_text(encoding="utf-8")
        return text, tomllib.loads(text)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise EdgekitError(f"not valid TOML: {error}", where=path) from None


def split_override(override: str) -> tuple[tuple[str, ...], Any]:
    """`train.epochs=5` -> (("train", "epochs"), 5). The value is TOML where it parses as such, else text."""
    name, equals, text = override.partition("=")
    key = tuple(part.strip() for part in name.split("."))
    if not equals or not all(key):
        raise EdgekitError("should look like table.key=value", where=f"--set {override}")
    try:
        return key, tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return key, text


def _place(document: dict[str, Any], key: tuple[str, ...], value: Any, override: str) -> None:
    for part in key[:-1]:
        below = document.setdefault(part, {})
        if isinstance(below, str):  # the short form: student = "resnet18"
            below = document[part] = {{"student": "architecture"}.get(part, "name"): below}
        if not isinstance(below, dict):
            raise EdgekitError(f"'{part}' is no table", where=f"--set {override}")
        document = below
    document[key[-1]] = value


def _fields(document: type[Table], location: Sequence[str]) -> Iterable[str]:
    """The keys known in the table at `location` of a document."""
    table: Any = document
    for part in location:
        annotation = table.model_fields[part].annotation
        table = next((kind for kind in (annotation, *getattr(annotation, "__args__", ())) if _is_table(kind)), None)
        if table is None:
            return ()
    return table.model_fields


def _is_table(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Table)


def sentence(
    error: ValidationError,
    path: str | Path,
    text: str,
    origin: Mapping[tuple[str, ...], str],
    document: type[Table] = Recipe,
    called: str = "recipe",
) -> EdgekitError:
    """What is wrong with a TOML document: its place, the key, and the nearest one where it is unknown."""
    # An unknown key first: a misspelt key often makes another one missing.
    first = min(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
    named = [str(part) for part in first["loc"] if not str(part).isdigit()]
    *above, key = named or [called]
    table = f"[{'.'.join(above)}]" if above else f"the {called}"
    where = origin.get(tuple(named)) or f"{path}{_line(text, tuple(named))}"
    if first["type"] == "extra_forbidden":
        return EdgekitError(f"{table} has no key '{key}'", where=where, mend=nearest(key, _fields(document, above)))
    if first["type"] == "missing":
        return EdgekitError(f"{table} needs the key '{key}'", where=where, mend="It has no default")
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    shown = "" if isinstance(first["input"], dict) else f", not {first['input']!r}"
    return EdgekitError(f"{table}: '{key}' {message}{shown}", where=where)


def _line(text: str, key: tuple[str, ...]) -> str:
    """ ", line 7" of `key` in the TOML text; of its table where the key is missing; empty where neither is there."""
    table: tuple[str, ...] = ()
    found = 0
    for index, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[\s*([^\[\]]+?)\s*\]", line):
            table = tuple(part.strip(" \"'") for part in header.group(1).split("."))
            if table == key:
                return f", line {index}"
            found = index if table == key[:-1] else found
        elif (entry := re.match(r"\s*([\w.\"'-]+)\s*=", line)) and (
            *table,
            *(part.strip("\"'") for part in entry.group(1).split(".")),
        ) == key:
            return f", line {index}"
    return f", line {found}" if found else ""


def to_toml(recipe: Recipe) -> str:
    """The recipe with every key resolved: reading it back gives an equal Recipe."""
    document = recipe.model_dump(mode="json", exclude_none=True)
    plain = [f"{key} = {_value(value)}" for key, value in document.items() if not isinstance(value, dict)]
    tables = [
        "\n".join([f"[{name}]", *(f"{key} = {_value(value)}" for key, value in table.items())])
        for name, table in document.items()
        if isinstance(table, dict)
    ]
    return "\n\n".join(["\n".join(plain), *tables]) + "\n"


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = "".join(
            f"\\u{ord(c):04x}" if ord(c) < 32 or ord(c) == 127 else c
            for c in value.replace("\\", "\\\\").replace('"', '\\"')
        )
        return f'"{escaped}"'
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_value(str(key))} = {_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    return repr(value)
