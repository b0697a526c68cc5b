"""A dataset name or a folder -> uint8 tensors, split into train, validation, calibration and test."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from edgekit.console import progress, say
from edgekit.errors import EdgekitError
from edgekit.files import cache_folder, digest, writing
from edgekit.randomness import integers
from edgekit.recipe import Data

IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
_DECODER = "2"  # raised with every change of what _decode makes of a file: older caches are decoded again


@dataclass(frozen=True)
class Split:
    """images (N, C, H, W) uint8, labels (N,) int64, index (N,) int64: each sample's place in the whole data."""

    images: Tensor
    labels: Tensor
    index: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: Tensor | slice) -> "Split":
        return Split(self.images[chosen], self.labels[chosen], self.index[chosen])

    def floats(self) -> Tensor:
        """The images as float32 in [0, 1]."""
        return self.images.to(torch.float32) / 255

    def to(self, device: torch.device | str) -> "Split":
        return Split(self.images.to(device), self.labels.to(device), self.index.to(device))


@dataclass(frozen=True)
class Dataset:
    """Four splits with no image in common; `sha256` covers every pixel, label and class name of all four."""

    name: str
    classes: tuple[str, ...]
    train: Split
    validation: Split
    calibration: Split
    test: Split
    sha256: str

    @property
    def input_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel of the training images, in units of [0, 1]."""
        count = torch.stack([(self.train.images == value).sum((0, 2, 3)) for value in range(256)], 1).double()
        levels = torch.arange(256, dtype=torch.float64) / 255
        mean = (count @ levels) / count.sum(1)
        variance = (count @ levels**2) / count.sum(1) - mean**2
        return mean.tolist(), variance.clamp(min=1e-4).sqrt().tolist()


def load(spec: Data) -> Dataset:
    """Read the data that a recipe names, decoded once and kept in the cache folder.

    Raises:
        EdgekitError: no such data, a broken image, images of several sizes with no `size`, fewer than two classes,
            or too few images to split.
    """
    if spec.name == "digits":
        images, labels, tested, classes = _digits()
    elif spec.name in ("cifar10", "cifar100"):
        images, labels, tested, classes = _cifar(spec)
    else:
        images, labels, tested, classes = _folder(Path(spec.name), spec.size)
    total = hashlib.sha256(json.dumps([classes, list(images.shape)]).encode())
    total.update(images.numpy().tobytes())
    total.update(labels.numpy().tobytes())
    return _split(spec, images, labels, tested, tuple(classes), total.hexdigest())


def stratified(labels: Tensor, count: int, seed: int) -> Tensor:
    """Indices (count,) of a draw in which each class has its share, in ascending order.

    The shares are rounded by the largest remainder, so that the draw has exactly min(count, N) samples. A larger draw
    with the same seed contains the smaller one's order within each class.
    """
    count = min(count, len(labels))
    generator = torch.Generator().manual_seed(seed)
    members = [group[torch.randperm(len(group), generator=generator)] for group in _groups(labels)]
    exact = [len(group) * count / max(1, len(labels)) for group in members]
    shares = [int(share) for share in exact]
    for place in sorted(range(len(exact)), key=lambda i: (shares[i] - exact[i], i))[: count - sum(shares)]:
        shares[place] += 1
    return torch.cat([group[:share] for group, share in zip(members, shares, strict=True)]).sort().values


def augment(images: Tensor, seeds: Tensor, pad: int, flip: bool) -> Tensor:
    """Random crops of the zero-padded images (N, C, H, W), and mirrored ones: sample i as seeds[i] says."""
    if not pad and not flip:
        return images
    height, width = images.shape[2:]
    drawn = integers(seeds, 3, 1 << 20)
    padded = torch.nn.functional.pad(images, (pad, pad, pad, pad))
    rows = (drawn[:, :1] % (2 * pad + 1) + torch.arange(height)).to(images.device)
    columns = (drawn[:, 1:2] % (2 * pad + 1) + torch.arange(width)).to(images.device)
    if flip:
        mirrored = (drawn[:, 2:] % 2 == 1).to(images.device)
        columns = torch.where(mirrored, columns.flip(1), columns)
    sample = torch.arange(len(images), device=images.device)
    # Advanced indices around a slice come first in the result: (N, H, W, C).
    return padded[sample[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _groups(labels: Tensor) -> list[Tensor]:
    return [(labels == label).nonzero().squeeze(1) for label in labels.unique()]


def _split(
    spec: Data, images: Tensor, labels: Tensor, tested: Tensor | None, classes: tuple[str, ...], sha256: str
) -> Dataset:
    everything = torch.arange(len(labels))
    if tested is None:  # one folder of classes: a fifth of it becomes the test split
        tested = torch.zeros(len(labels), dtype=torch.bool)
        tested[stratified(labels, max(1, round(0.2 * len(labels))), spec.split_seed)] = True
    test, pool = everything[tested], everything[~tested]
    seen = {hashlib.sha256(images[i].numpy().tobytes()).digest() for i in test.tolist()}
    kept = []
    for i in pool.tolist():
        if (key := hashlib.sha256(images[i].numpy().tobytes()).digest()) not in seen:
            seen.add(key)
            kept.append(i)
    if dropped := len(pool) - len(kept):
        say(f"{dropped} training images are left out: the same pixels stand in the test split or twice in training")
    pool = torch.tensor(kept, dtype=torch.int64)

    def take(pool: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
        chosen = torch.zeros(len(pool), dtype=torch.bool)
        chosen[stratified(labels[pool], count, seed)] = True
        return pool[chosen], pool[~chosen]

    validation, pool = take(pool, max(1, round(spec.validation * len(pool))), spec.split_seed + 1)
    calibration, pool = take(pool, min(spec.calibration, len(pool) // 4), spec.split_seed + 2)
    if len(pool) < 2 or not len(calibration) or labels[pool].unique().numel() != len(classes):
        raise EdgekitError("too few images to set some aside for validation, calibration and test", where=spec.name)

    def split(chosen: Tensor) -> Split:
        return Split(images[chosen], labels[chosen], chosen)

    # The name in reports is the folder's own; where it lies on this machine is nobody's business.
    name = spec.name if spec.name in ("digits", "cifar10", "cifar100") else Path(spec.name).resolve().name
    return Dataset(name, classes, split(pool), split(validation), split(calibration), split(test), sha256)


def _digits() -> tuple[Tensor, Tensor, Tensor, list[str]]:
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    images = torch.from_numpy((data.images * (255 / 16)).round().astype("uint8"))[:, None]
    labels = torch.from_numpy(data.target.astype("int64"))
    tested = torch.zeros(len(labels), dtype=torch.bool)
    tested[stratified(labels, round(0.4 * len(labels)), seed=0)] = True
    return images, labels, tested, [str(name) for name in data.target_names]


def _cifar(spec: Data) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    import torchvision

    kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[spec.name]
    root = Path(spec.root) if spec.root else cache_folder() / "downloads"
    try:
        halves = [kind(str(root), train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise EdgekitError(
            f"{spec.name} is not there and cannot be downloaded ({error})",
            where=root,
            mend=f"Put {kind.filename} there, or set data.name to a folder of images",
        ) from None
    images = torch.cat([torch.from_numpy(half.data) for half in halves]).permute(0, 3, 1, 2).contiguous()
    labels = torch.tensor([label for half in halves for label in half.targets])
    tested = torch.arange(len(labels)) >= len(halves[0].targets)
    return images, labels, tested, list(halves[0].classes)


def _folder(folder: Path, size: int | None) -> tuple[Tensor, Tensor, Tensor | None, list[str]]:
    if not folder.is_dir():
        raise EdgekitError(
            "there is no such data folder", where=folder, mend="Name digits, cifar10, cifar100 or a folder"
        )
    halves = [folder / name for name in ("train", "test")]
    # A folder `train` of images is a class like any other; one of folders is a half of the data.
    there = [half for half in halves if half.is_dir() and any(_classes(half))]
    if len(there) == 1:
        (missing,) = {*halves} - {*there}
        raise EdgekitError(
            f"{there[0].name}/ holds classes, {missing.name}/ holds none",
            where=folder,
            mend=f"Add {missing.name}/CLASS/*.jpg, or name {there[0]}, of which a part is then set aside for the test",
        )
    roots = there or [folder]
    classes = sorted({path.name for root in roots for path in _classes(root)})
    files = [
        (path, label, number == 1)
        for number, root in enumerate(roots)
        for label, name in enumerate(classes)
        for path in (sorted((root / name).iterdir()) if (root / name).is_dir() else ())
        if path.suffix.lower() in IMAGES
    ]
    if not files:
        raise EdgekitError(
            "there are no images", where=folder, mend="Expected train/CLASS/*.jpg and test/CLASS/*.jpg, or CLASS/*.jpg"
        )
    if len(classes) < 2:
        raise EdgekitError("there is only one class", where=folder, mend="A classifier needs two folders or more")
    counted = {(int(tested), label) for _, label, tested in files}
    for number, root in enumerate(roots):
        for label, name in enumerate(classes):
            if (number, label) not in counted:
                raise EdgekitError(
                    "the class has no images", where=root / name, mend=f"An image ends in {', '.join(sorted(IMAGES))}"
                )
    for path, _, _ in files:
        if not path.is_file():
            fault = "the link leads nowhere" if path.is_symlink() else "this is no file"
            raise EdgekitError(fault, where=path, mend="Mend or remove it")
    stats = [path.stat() for path, _, _ in files]
    listing = [
        f"{p.relative_to(folder)}:{s.st_size}:{s.st_mtime_ns}" for (p, _, _), s in zip(files, stats, strict=True)
    ]
    cache = cache_folder() / "data" / f"{digest(_DECODER, str(folder.resolve()), str(size), *listing)}.safetensors"
    images = _cached(cache)
    if images is None:
        images = decode([path for path, _, _ in files], size)
        with writing(cache) as part:
            save_file({"images": images}, part)
    tested = torch.tensor([test for _, _, test in files]) if there else None
    return images, torch.tensor([label for _, label, _ in files]), tested, classes


def _classes(folder: Path) -> Iterator[Path]:
    """The folders of classes in `folder`.

    Raises:
        EdgekitError: a link leads nowhere; it may have been a class.
    """
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_symlink() and not path.exists():
            raise EdgekitError("the link leads nowhere", where=path, mend="Mend or remove it")
        if path.is_dir():
            yield path


def _cached(path: Path) -> Tensor | None:
    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor("images")
    except (OSError, SafetensorError):
        return None


def decode(
    paths: Sequence[Path], size: int | tuple[int, int] | None, mend: str = "Set data.size, to which all are resized"
) -> Tensor:
    """(N, 3, H, W) uint8, RGB; cropped to the middle and resized where `size` (one side, or height and width) says so.

    Raises:
        EdgekitError: a broken image (named), or one of another size than the first; `mend` says what then helps.
    """
    import numpy
    from PIL import Image, ImageOps

    pixels: list[Tensor] = []
    with progress() as bar:
        task = bar.add_task("decoding images", total=len(paths), note="")
        for path in paths:
            try:
                with Image.open(path) as image:
                    # As people see it: a camera that was held upright says so beside the pixels.
                    picture = _eight_bits(ImageOps.exif_transpose(image), image).convert("RGB")
                    if size:
                        height, width = (size, size) if isinstance(size, int) else size
                        picture = ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC)
                    pixels.append(torch.from_numpy(numpy.asarray(picture).copy()))
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                # A file that cannot be read at all is the machine's fault; one that cannot be decoded is the data's.
                if isinstance(error, OSError) and error.errno is not None:
                    raise
                reason = str(error).split(os.fspath(path))[0].strip(" '")
                raise EdgekitError(
                    f"a broken image ({reason})", where=path, mend="Replace or remove the file"
                ) from None
            if pixels[-1].shape != pixels[0].shape:
                raise EdgekitError(
                    f"the image is {tuple(pixels[-1].shape[:2])} pixels, the first one {tuple(pixels[0].shape[:2])}",
                    where=path,
                    mend=mend,
                )
            bar.advance(task)
    return torch.stack(pixels).permute(0, 3, 1, 2).contiguous()


def _eight_bits(picture: Any, file: Any) -> Any:
    """A PIL image with 8 bits a channel; PIL's own conversion would cut off whatever is above 255.

    Args:
        file: the opened image that `picture` was made from, which knows its format.
    Raises:
        ValueError: its pixels are floats, or integers of which nobody knows the largest.
    """
    import numpy
    from PIL import Image

    if picture.mode not in ("F", "I") and not picture.mode.startswith("I;"):
        return picture
    # PNG and PGM come as 16 bits whatever they hold; a TIFF says how many of them are used (tag 258).
    bits = file.tag_v2.get(258, (0,))[0] if file.format == "TIFF" else 16
    if picture.mode == "F" or not 8 < bits <= 16:
        raise ValueError(f"pixels of mode {picture.mode} in a {file.format} file have no known range")
    levels = numpy.asarray(picture).astype(numpy.float64) * (255 / (2**bits - 1))
    return Image.fromarray(levels.round().clip(0, 255).astype(numpy.uint8))
