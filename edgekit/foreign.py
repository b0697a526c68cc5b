"""A model file that edgekit did not write, and the photos to judge it on: what the file says, what the user says.

`port` settles how images become what the file eats and what it answers becomes scores; `photos` draws the images and
numbers their classes as the file does. What neither the file nor an option says, and what matters, is asked for.
"""

import ast
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edgekit import data
from edgekit import twin as twins
from edgekit.console import say
from edgekit.data import Split
from edgekit.errors import EdgekitError, nearest
from edgekit.files import digest, sha256
from edgekit.recipe import typed

if TYPE_CHECKING:
    from onnx import ModelProto, ValueInfoProto

LAYOUTS, CHANNELS = ("nchw", "nhwc"), ("rgb", "bgr")
SMALLEST_PROBABILITY = 1e-30  # below it a probability is taken for this one: its logarithm must stay finite
_SAME_NUMBERS = ("Identity", "Cast", "Reshape", "Flatten", "Squeeze", "QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True)
class Said:
    """What the user says of a file, each None where nothing was said.

    Attributes:
        mean, std: one number or one per channel in RGB order, in units of [0, 1], as typed: "0.5", "123/255,116/255,…".
        layout: "nchw" or "nhwc".    channels: "rgb" or "bgr".
        output: the name of the tensor that holds the scores.
        classes: a file with one class name a line, or a JSON list of them, in the order of the scores.
        resize: whether photos of another size are cropped and resized to the file's.
        size: the side of the images, in pixels, where the file takes any.
        trust_file: the file may run its code: TorchScript is opened.
    """

    mean: str | None = None
    std: str | None = None
    layout: str | None = None
    channels: str | None = None
    output: str | None = None
    classes: Path | None = None
    resize: bool = False
    size: int | None = None
    trust_file: bool = False

    def options(self) -> list[str]:
        """The names of the options that were given."""
        return [f"--{name.replace('_', '-')}" for name, value in vars(self).items() if value]


@dataclass(frozen=True)
class Port:
    """How (N, C, H, W) float32 images in [0, 1], RGB, become what a file eats, and its answers (N, K) scores.

    Attributes:
        input, output: names of the tensors.    element: the ONNX element type of the input, such as "float16".
        channels: 1 or 3.    height, width: None where the file takes any.
        classes: the number K, None where only a run would tell.
        mean, std: (C,) in units of [0, 1]; None: the normalization is inside, or there is none.
        probabilities: a softmax ends the file: its answers' logarithms are the scores.
        names: the class names that the file carries, or the user's.
    """

    input: str
    output: str
    element: str
    channels: int
    height: int | None
    width: int | None
    classes: int | None
    layout: str
    bgr: bool
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    probabilities: bool
    names: tuple[str, ...] | None

    def eat(self, images: Tensor) -> Tensor:
        """The file's input, in float32 and differentiable: what is to be cast to `element` is cast by the runtime."""
        x = images.flip(1) if self.bgr else images
        if self.mean is not None and self.std is not None:
            mean, std = (x.new_tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
            if self.bgr:
                mean, std = mean.flip(1), std.flip(1)
            x = (x - mean) / std
        if self.element == "uint8":
            x = x * 255
        return x.permute(0, 2, 3, 1) if self.layout == "nhwc" else x

    def scores(self, answers: Tensor) -> Tensor:
        """(N, …) as the file answers -> (N, K) scores, of which the highest is the decision."""
        flat = answers.reshape(len(answers), -1).float()
        return flat.clamp(min=SMALLEST_PROBABILITY).log() if self.probabilities else flat

    def describe(self) -> str:
        """Such as "RGB, NCHW, 224 x 224, logits": what was settled, for the user to see."""
        size = "any size" if self.height is None else f"{self.height} x {self.width}"
        order = "gray" if self.channels == 1 else "BGR" if self.bgr else "RGB"
        levels = "0 to 255" if self.element == "uint8" else "in [0, 1]"
        inside = f"{levels}, not normalized" if self.mean is None else f"normalized by {_numbers(self.mean)}"
        answers = "probabilities" if self.probabilities else "scores"
        return f"{order}, {self.layout.upper()}, {size}, {inside}; it answers {answers}"


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


class Ported:
    """A raw runtime or twin behind a Port: a Classifier of [0, 1] images.

    `raw` takes what the file eats, as float32 (N, …), in any number, and answers float32 (N, …).
    """

    def __init__(self, port: Port, raw: Callable[[Tensor], Tensor], *, differentiable: bool) -> None:
        self.port, self.raw, self.differentiable = port, raw, differentiable

    def __call__(self, images: Tensor) -> Tensor:
        return self.port.scores(self.raw(self.port.eat(images)))


# The file -------------------------------------------------------------------------------------------------------------


def read(path: Path) -> "ModelProto":
    """The graph of an ONNX file, its external data included, checked for what must never be opened.

    Raises:
        EdgekitError: no such file, no ONNX model, external data outside the file's folder, or an invalid graph.
    """
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise EdgekitError("there is no such file", where=path)
    if utf8(path) != str(path):  # the libraries below refuse it, each in words of its own
        raise EdgekitError("the name is no UTF-8", where=utf8(path), mend="Rename the file or its folder")
    if path.suffix in (".pt", ".ptl", ".pth", ".torchscript"):
        raise EdgekitError(
            "TorchScript and pickles are code, and are not opened here",
            where=path,
            mend="Export it to ONNX with torch.onnx.export",
        )
    try:
        model = onnx.load(path, format="protobuf", load_external_data=False)  # whatever the suffix would mean to onnx
    except (DecodeError, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise EdgekitError("not an ONNX model", where=path, mend="edgekit verify takes ONNX files") from None
    if not model.graph.node or not model.graph.output:
        raise EdgekitError("not an ONNX model (it has no graph)", where=path, mend="edgekit verify takes ONNX files")
    for name in external(model):
        target = path.parent / name
        if (
            Path(name).is_absolute()
            or not target.resolve().is_relative_to(path.parent.resolve())
            or target.is_symlink()
        ):
            raise EdgekitError(f"its external data '{name}' lies outside its folder", where=path)
        if not target.is_file():
            raise EdgekitError(f"its external data '{name}' is missing", where=path)
    try:
        onnx.checker.check_model(path)
        if external(model):
            onnx.load_external_data_for_model(model, str(path.parent))
    except (onnx.checker.ValidationError, ValueError, OSError) as error:
        raise EdgekitError(f"an invalid ONNX graph ({first_line(error)})", where=path) from None
    return model


def external(model: "ModelProto") -> list[str]:
    """The files beside the model that hold its weights, as the model names them."""
    return sorted(
        {entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"}
    )


def fingerprint(path: Path, model_files: Sequence[str]) -> str:
    """Hex sha256 of the file; of all its parts where its weights lie beside it."""
    own = sha256(path)
    return digest(own, *(sha256(path.parent / name) for name in model_files)) if model_files else own


def port(path: Path, model: "ModelProto", said: Said) -> Port:
    """Settle how the file is fed and read.

    Raises:
        EdgekitError: it is no image classifier with one input, or something that matters is not said (named, with the
            option that says it).
    """
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    given = _input(path, model)
    element, shape = _element(path, given), _shape(given)
    layout = _layout(path, given.name, shape, said.layout, metadata)
    sizes = shape if layout == "nchw" else [shape[0], shape[3], shape[1], shape[2]]
    channels = sizes[1] or 3
    if channels not in (1, 3):
        raise EdgekitError(f"the input '{given.name}' has {channels} channels; images have 1 or 3", where=path)
    order = said.channels or metadata.get("channels", "rgb").lower()
    if order not in CHANNELS:
        raise EdgekitError(
            f"there is no order of channels '{order}'", where="--channels", mend=nearest(order, CHANNELS)
        )
    mean, std = normalization(said, metadata, channels, path)
    answer = _output(path, model, said.output)
    width = _shape(answer)[1:] if answer.type.tensor_type.HasField("shape") else []
    classes = None
    if width and all(width):
        classes = 1
        for part in width:
            classes *= part or 1
        if classes < 2:
            raise EdgekitError(f"the output '{answer.name}' has one value: no classifier of two or more", where=path)
    names = class_names(said.classes, metadata)
    if names and classes and len(names) != classes:
        where = said.classes or path
        raise EdgekitError(f"{len(names)} class names for the {classes} scores of '{answer.name}'", where=where)
    return Port(
        input=given.name,
        output=answer.name,
        element=element,
        channels=channels,
        height=sizes[2],
        width=sizes[3],
        classes=classes,
        layout=layout,
        bgr=order == "bgr" and channels == 3,
        mean=mean,
        std=std,
        probabilities=_ends_in_softmax(model, answer.name),
        names=names,
    )


def precision(model: "ModelProto") -> str:
    """What the file computes in, by its operators and weights: int8, fp16 or fp32."""
    from onnx import TensorProto

    kinds = {node.op_type for node in model.graph.node}
    if any("Quantize" in kind or kind.startswith("QLinear") or kind.endswith("Integer") for kind in kinds):
        return "int8"
    half = any(tensor.data_type == TensorProto.FLOAT16 for tensor in model.graph.initializer)
    return "fp16" if half else "fp32"


def count_classes(path: Path, port: Port, raw: Callable[[Tensor], Tensor], said: Said) -> int:
    """K of a file that does not say it, from its answer to one gray image.

    Raises:
        EdgekitError: the size of its images is not known either.
    """
    height, width = port.height or said.size, port.width or said.size
    if height is None or width is None:
        raise EdgekitError("neither the size of its images nor its classes are fixed", where=path, mend="Say --size N")
    image = torch.full((1, port.channels, height, width), 0.5)
    return Ported(port, raw, differentiable=False)(image).shape[1]


def twin(path: Path, port: Port) -> Ported | None:
    """The differentiable copy of the file behind its port; None, and said so, where an operator has no rule."""
    try:
        copy = twins.open(path, port.output)
    except EdgekitError as error:
        say(f"{error}: attacks must follow the scores, or a --source")
        return None
    # Where the copy answers what comes before a softmax, no logarithm is to be taken.
    inside = replace(port, probabilities=port.probabilities and copy.before_softmax is None)
    return Ported(inside, copy, differentiable=True)


def _input(path: Path, model: "ModelProto") -> "ValueInfoProto":
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = [one for one in model.graph.input if one.name not in stored]
    if len(inputs) != 1:
        named = ", ".join(f"'{one.name}'" for one in inputs) or "none"
        raise EdgekitError(f"an image classifier has one input, this file has {len(inputs)} ({named})", where=path)
    given = inputs[0]
    if len(given.type.tensor_type.shape.dim) != 4:
        raise EdgekitError(f"the input '{given.name}' is no batch of images: it has not four dimensions", where=path)
    return given


def _element(path: Path, given: "ValueInfoProto") -> str:
    import onnx

    element = onnx.TensorProto.DataType.Name(given.type.tensor_type.elem_type).lower()
    known = {"float": "float32", "float16": "float16", "double": "float64", "uint8": "uint8"}
    if element not in known:
        raise EdgekitError(f"the input '{given.name}' holds {element}; images are float or uint8", where=path)
    return known[element]


def _shape(value: "ValueInfoProto") -> list[int | None]:
    """None for a dimension that is not fixed."""
    return [dim.dim_value if dim.dim_value > 0 else None for dim in value.type.tensor_type.shape.dim]


def image_shape(path: Path, model: "ModelProto") -> tuple[int, int, int]:
    """What one image is to the file: (C, H, W), or (H, W, C) where the file is so.

    Raises:
        EdgekitError: it is no image classifier with one input, or takes images of any size.
    """
    given = _input(path, model)
    _element(path, given)
    shape = _shape(given)
    first, second, third = shape[1:]
    if first is None or second is None or third is None:
        raise EdgekitError(f"the input '{given.name}' is {_dims(shape)}: images of which size is not said", where=path)
    return first, second, third


def _layout(path: Path, name: str, shape: Sequence[int | None], said: str | None, metadata: Mapping[str, str]) -> str:
    told = said or metadata.get("layout")
    if told:
        layout = told.lower()
        if layout not in LAYOUTS:
            raise EdgekitError(f"there is no layout '{told}'", where="--layout", mend=nearest(layout, LAYOUTS))
        place = 1 if layout == "nchw" else 3
        if shape[place] not in (1, 3, None):
            raise EdgekitError(
                f"the input '{name}' is {_dims(shape)}: with {layout} it has {shape[place]} channels",
                where=f"--layout {layout}" if said else path,
            )
        return layout
    first, last = shape[1] in (1, 3), shape[3] in (1, 3)
    if first == last:
        raise EdgekitError(
            f"the input '{name}' is {_dims(shape)}: where the channels are is not said", where=path,
            mend="Say --layout nchw or --layout nhwc",
        )  # fmt: skip
    return "nchw" if first else "nhwc"


def _dims(shape: Sequence[int | None]) -> str:
    return " x ".join("?" if size is None else str(size) for size in shape)


def normalization(
    said: Said, metadata: Mapping[str, str], channels: int, path: Path
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Mean and standard deviation in units of [0, 1], each from its option, else from the metadata; or none at all."""
    options = {"mean": said.mean, "std": said.std}
    typed_ones = [f"--{name} {text}" for name, text in options.items() if text]
    if typed_ones and _inside(metadata):
        raise EdgekitError(
            "the file's metadata says that it normalizes its images itself", where=typed_ones[0], mend="Leave it out"
        )
    found: dict[str, tuple[float, ...]] = {}
    places: dict[str, str] = {}
    for name, text in options.items():
        if text:
            places[name] = f"--{name} {text}"
            found[name] = _values(f"--{name}", text, channels)
        elif name in metadata:
            places[name] = f"{path}, metadata '{name}'"
            found[name] = _values(places[name], metadata[name].strip("[]() "), channels)
    if not found:
        return None, None
    if not typed_ones and len(found) == 1:
        # A network may well subtract a mean and divide by nothing, or by what nobody wrote down.
        (here,), missing, none = found, *(("std", 1) if "mean" in found else ("mean", 0))
        raise EdgekitError(
            f"the metadata has '{here}' and no '{missing}'", where=path, mend=f"Say --{missing} {none} if there is none"
        )
    mean, std = found.get("mean", (0.0,) * channels), found.get("std", (1.0,) * channels)
    if min(std) <= 0:
        raise EdgekitError("a standard deviation is above 0", where=places["std"])
    if not typed_ones and min(mean) > 1 and min(std) > 1:
        # (255 x - mean) / std: numbers of this size can only count levels.
        mean, std = (tuple(value / 255 for value in values) for values in (mean, std))
    if max(map(abs, mean)) > 1 or max(std) > 1:
        of_user = [places[name] for name in found if options[name]] or [f"{path}, metadata 'mean' and 'std'"]
        mend = "Write 123/255 for 123 of 255 levels"
        if not typed_ones:
            mend = f"Say --mean and --std, which go before it. {mend}"
        raise EdgekitError("means and standard deviations are in units of [0, 1]", where=" ".join(of_user), mend=mend)
    return mean, std


def _inside(metadata: Mapping[str, str]) -> bool:
    """Whether edgekit wrote the file, whose networks normalize inside."""
    try:
        return json.loads(metadata["input"])["normalization"] == "inside"
    except (KeyError, TypeError, ValueError):
        return False


def _values(where: str, text: str, channels: int) -> tuple[float, ...]:
    try:
        values = tuple(typed(part.strip()) for part in text.split(","))
    except (ValueError, OverflowError):
        raise EdgekitError("should be numbers such as 0.485,0.456,0.406 or 123/255", where=f"{where} {text}") from None
    if len(values) not in (1, channels) or not all(abs(value) < 1e6 for value in values):
        raise EdgekitError(f"should be one number, or {channels}, one per channel", where=f"{where} {text}")
    return values * channels if len(values) == 1 else values


def _output(path: Path, model: "ModelProto", said: str | None) -> "ValueInfoProto":
    outputs = {one.name: one for one in model.graph.output}
    if said is not None:
        if said not in outputs:
            raise EdgekitError(f"the file has no output '{said}'", where=path, mend=nearest(said, outputs))
        return outputs[said]
    if len(outputs) == 1:
        return next(iter(outputs.values()))
    scores = [one for one in outputs.values() if len(_shape(one)) == 2]
    if len(scores) != 1:
        named = ", ".join(f"'{name}'" for name in outputs)
        raise EdgekitError(
            f"which of its outputs {named} holds the scores is not said", where=path, mend="Say --output NAME"
        )
    return scores[0]


def _ends_in_softmax(model: "ModelProto", output: str) -> bool:
    """Whether a softmax, and after it nothing that computes, ends the file."""
    made_by = {name: node for node in model.graph.node for name in node.output}
    node = made_by.get(output)
    while node is not None and node.op_type in _SAME_NUMBERS:
        node = made_by.get(node.input[0])
    return node is not None and node.op_type == "Softmax"


def utf8(name: str | Path) -> str:
    """A file's name, with bytes that are no UTF-8 shown as escapes: no JSON document could hold them."""
    return os.fsencode(name).decode(errors="backslashreplace")


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


# Photos ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Photos:
    """A draw from a folder of photos: images (N, C, H, W) uint8, labels (N,) as the file numbers them, index (N,).

    `sha256` covers the bytes and the names of all its photos, whichever were drawn.
    """

    split: Split
    name: str
    sha256: str


def photos(folder: Path, port: Port, classes: int, said: Said, samples: int, seed: int) -> Photos:
    """A seeded, stratified draw from FOLDER/test/CLASS/* or FOLDER/CLASS/*, as the file takes its images.

    Args:
        classes: how many scores the file answers.
    Raises:
        EdgekitError: no folder, no images, a class without any, more classes than scores, an image that is broken or
            of another size than the file's.
    """
    root, folders = _rooted(folder)
    names = [one.name for one in folders]
    places, named = matched(names, port.names, classes)
    files = [sorted(path for path in one.iterdir() if path.suffix.lower() in data.IMAGES) for one in folders]
    for one, found in zip(folders, files, strict=True):
        if not found:
            raise EdgekitError("the class has no images", where=one)
    paths = [path for found in files for path in found]
    labels = torch.tensor([place for place, found in zip(places, files, strict=True) for _ in found])
    chosen = data.stratified(labels, samples, seed)
    tell(port, names, named)
    images = _as_taken(data.decode([paths[i] for i in chosen.tolist()], _size(port, said), _MEND), port, paths[0])
    # Of all photos, not of those drawn: another seed or number of samples is another look at the same data.
    total = digest(*(part for path in paths for part in (os.fsencode(path.relative_to(root)), sha256(path))))
    return Photos(Split(images, labels[chosen], chosen), utf8(folder.resolve().name), total)


def first_photo(folder: Path) -> Path:
    """The first photo of a folder of class folders.

    Raises:
        EdgekitError: there is none.
    """
    _, folders = _rooted(folder)
    found = sorted(path for path in folders[0].iterdir() if path.suffix.lower() in data.IMAGES)
    if not found:
        raise EdgekitError("the class has no images", where=folders[0])
    return found[0]


def _rooted(folder: Path) -> tuple[Path, list[Path]]:
    """The folder that holds the class folders, and these."""
    if not folder.is_dir():
        raise EdgekitError("there is no such folder", where=f"--data {folder}")
    root = folder / "test" if (folder / "test").is_dir() and _class_folders(folder / "test") else folder
    folders = _class_folders(root)
    if not folders:
        mend = "Expected FOLDER/CLASS/*.jpg or FOLDER/test/CLASS/*.jpg"
        raise EdgekitError("there are no class folders", where=f"--data {folder}", mend=mend)
    return root, folders


_MEND = "Say --resize to crop and resize them, and --size N where the file takes any size"


def _class_folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and path.name[0] != ".")


def _size(port: Port, said: Said) -> tuple[int, int] | None:
    if port.height is not None and port.width is not None:
        if said.size not in (None, port.height):
            raise EdgekitError(
                f"the file takes {port.height} x {port.width} pixels and nothing else", where=f"--size {said.size}"
            )
        return (port.height, port.width) if said.resize else None
    if said.resize and said.size is None:
        raise EdgekitError("the file takes any size, and none is said", where="--resize", mend="Say --size N as well")
    return None if said.size is None else (said.size, said.size)


def _as_taken(images: Tensor, port: Port, first: Path) -> Tensor:
    height, width = images.shape[2:]
    if (port.height or height, port.width or width) != (height, width):
        raise EdgekitError(
            f"the image is {height} x {width} pixels, the file takes {port.height} x {port.width}",
            where=first,
            mend="Say --resize to crop and resize all to that",
        )
    if port.channels == 3:
        return images
    # Rec. 601, as every decoder turns colour into gray.
    gray = (images.float() * images.new_tensor([0.299, 0.587, 0.114], dtype=torch.float32).view(1, 3, 1, 1)).sum(1)
    return gray.round().clamp(0, 255).to(torch.uint8)[:, None]


# Class names ----------------------------------------------------------------------------------------------------------


def class_names(file: Path | None, metadata: Mapping[str, str]) -> tuple[str, ...] | None:
    """From the user's file, else from the metadata: a list, or a mapping from number to name, as JSON or Python."""
    if file is not None:
        if not file.is_file():
            raise EdgekitError("there is no such file", where=f"--classes {file}")
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise EdgekitError("not a text file of class names", where=f"--classes {file}") from None
        names = _listed(text) or tuple(line.strip() for line in text.splitlines() if line.strip())
        if len(names) < 2:
            raise EdgekitError("there are not two class names in it", where=f"--classes {file}")
        return names
    for key in ("classes", "names", "labels", "class_names"):
        if key in metadata and (names := _listed(metadata[key])):
            return names
    return None


def _listed(text: str) -> tuple[str, ...] | None:
    document: Any = None
    for parse in (json.loads, ast.literal_eval):  # literals only: neither runs anything
        try:
            document = parse(text)
            break
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    if isinstance(document, dict):
        try:
            document = [document[key] for key in sorted(document, key=int)]
        except (TypeError, ValueError):
            return None
    if isinstance(document, list | tuple) and len(document) > 1:
        return tuple(str(name) for name in document)
    return None


def matched(folders: Sequence[str], names: Sequence[str] | None, classes: int) -> tuple[list[int], bool]:
    """The place among the file's scores of each class folder, and whether names decided it.

    Names match where every folder has one (numbers compare as numbers: 090 is 90), else the sorted order does.

    Raises:
        EdgekitError: there are more folders than scores.
    """
    if len(folders) > classes:
        raise EdgekitError(f"{len(folders)} class folders are more than the file's {classes} classes", where="--data")
    if names is not None:
        places = {_canonical(name): place for place, name in reversed(list(enumerate(names)))}
        if all(_canonical(folder) in places for folder in folders):
            return [places[_canonical(folder)] for folder in folders], True
    return list(range(len(folders))), False


def _canonical(name: str) -> str:
    text = re.sub(r"[\s_-]+", " ", name.strip().casefold())
    # Not through int(), which refuses thousands of digits with an error of its own.
    return text.lstrip("0") or "0" if text.isascii() and text.isdigit() else text


def tell(port: Port, folders: Sequence[str], named: bool) -> None:
    """Say on stderr what was settled without having been asked for."""
    say(f"The file takes images {port.describe()}")
    if not named:
        why = "carries no class names" if port.names is None else "has no class of some folder's name"
        say(f"The file {why}: its scores are taken in the sorted order of the folders ({', '.join(folders[:4])}, …)")
