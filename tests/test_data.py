import hashlib
import os
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from edgekit import data
from edgekit.errors import EdgekitError
from edgekit.recipe import Data

INDEX = torch.arange(30)


def folder(root: Path, splits: tuple[str, ...] = ("train", "test"), count: int = 30) -> Path:
    generator = numpy.random.default_rng(0)
    for split in splits:
        for name in ("ant", "bee"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (12, 12, 3), dtype=numpy.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


def digests(split: data.Split) -> set[bytes]:
    return {hashlib.sha256(image.numpy().tobytes()).digest() for image in split.images}


def test_digits_have_719_test_images_and_no_image_twice():
    dataset = data.load(Data(name="digits"))
    assert len(dataset.test) == 719
    splits = [dataset.train, dataset.validation, dataset.calibration, dataset.test]
    assert len(set().union(*map(digests, splits))) == sum(len(digests(split)) for split in splits)
    assert torch.cat([split.index for split in splits]).unique().numel() == sum(map(len, splits))
    counts = torch.bincount(dataset.test.labels).tolist()
    assert max(counts) - min(counts) <= 5  # stratified, as the digits themselves are
    assert dataset.test.images.max() == 255
    assert data.load(Data(name="digits")).sha256 == dataset.sha256


def test_statistics_are_those_of_the_training_images():
    dataset = data.load(Data(name="digits"))
    mean, std = dataset.statistics()
    floats = dataset.train.floats().double()
    assert mean == pytest.approx([floats.mean().item()], abs=1e-6)
    assert std == pytest.approx([floats.std(correction=0).item()], abs=1e-6)


def test_a_folder_is_decoded_once_and_its_test_images_never_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = folder(tmp_path / "photos")
    (root / "train/ant/0.png").write_bytes((root / "test/ant/0.png").read_bytes())  # a leak
    spec = Data(name=str(root), validation=0.2, calibration=8)
    first = data.load(spec)
    assert first.classes == ("ant", "bee")
    assert len(first.test) == 60
    assert len(first.train) + len(first.validation) + len(first.calibration) == 59
    assert not digests(first.test) & digests(first.train)
    monkeypatch.setattr(data, "decode", lambda *_: pytest.fail("decoded again"))
    again = data.load(spec)
    assert again.sha256 == first.sha256
    assert again.train.images.equal(first.train.images)


def test_one_folder_of_classes_is_split_by_its_seed(tmp_path: Path):
    root = folder(tmp_path / "photos", splits=(".",))
    first, second = (data.load(Data(name=str(root), calibration=4, split_seed=seed)) for seed in (0, 1))
    assert len(first.test) == 12
    assert not first.test.index.equal(second.test.index)
    assert torch.bincount(first.test.labels).tolist() == [6, 6]


def test_images_of_several_sizes_need_a_size(tmp_path: Path):
    root = folder(tmp_path / "photos")
    Image.new("L", (20, 14), 7).save(root / "train/bee/wide.jpg")
    with pytest.raises(EdgekitError, match=r"wide\.jpg.*Set data\.size"):
        data.load(Data(name=str(root)))
    assert data.load(Data(name=str(root), size=8, calibration=4)).input_shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda root: (root / "train/bee/3.png").write_bytes((root / "train/bee/3.png").read_bytes()[:90]),
            r"bee/3\.png: a broken image",
        ),
        (lambda root: [path.unlink() for path in root.rglob("*.png")], "there are no images"),
        (lambda root: [path.unlink() for path in (root / "test/bee").iterdir()], "test/bee: the class has no images"),
        (lambda root: (root / "train/cat").mkdir(), "train/cat: the class has no images"),
        (lambda root: shutil.rmtree(root / "test"), r"photos: train/ holds classes, test/ holds none. Add test/CLASS"),
        (lambda root: [shutil.rmtree(path) for path in (root / "test").iterdir()], "train/ holds classes, test/ holds"),
        (lambda root: shutil.rmtree(root / "train"), r"photos: test/ holds classes, train/ holds none. Add train/CLAS"),
        (lambda root: (root / "train/ant/7.jpg").symlink_to("nowhere"), r"train/ant/7\.jpg: the link leads nowhere"),
        (lambda root: (root / "train/cow").symlink_to("nowhere"), "train/cow: the link leads nowhere"),
        (lambda root: (root / "train/ant/7.jpg").mkdir(), r"train/ant/7\.jpg: this is no file"),
        (
            lambda root: Image.new("F", (12, 12), 0.5).save(root / "train/ant/7.tif"),
            r"7\.tif: a broken image .*mode F in a TIFF file have no known range",
        ),
    ],
)
def test_a_spoilt_folder_is_reported_by_name(tmp_path: Path, spoil, said: str):
    root = folder(tmp_path / "photos", count=6)
    spoil(root)
    with pytest.raises(EdgekitError, match=said):
        data.load(Data(name=str(root)))


def test_an_empty_class_of_an_undivided_folder_is_named(tmp_path: Path):
    root = folder(tmp_path / "photos", splits=(".",), count=6)
    (root / "notes").mkdir()
    with pytest.raises(EdgekitError, match=r"photos/notes: the class has no images\. An image ends in \.bmp, \.jpeg"):
        data.load(Data(name=str(root)))


def test_a_class_may_be_called_train(tmp_path: Path):
    root = folder(tmp_path / "photos", splits=(".",))
    (root / "bee").rename(root / "train")
    assert data.load(Data(name=str(root), calibration=4)).classes == ("ant", "train")


@pytest.mark.parametrize("name", ["deep.png", "deep.tif", "deep.pgm"])
def test_sixteen_bits_become_eight(tmp_path: Path, name: str):
    levels = numpy.linspace(0, 65535, 64).astype(numpy.uint16).reshape(8, 8)
    path = tmp_path / name
    if path.suffix == ".pgm":
        path.write_bytes(b"P5 8 8 65535\n" + levels.astype(">u2").tobytes())
    else:
        Image.fromarray(levels).save(path)
    (image,) = data.decode([path], None)
    expected = (levels.astype(int) + 128) // 257  # 65535 = 255 * 257
    assert image.numpy().tolist() == [expected.tolist()] * 3


@pytest.mark.parametrize("kind", [numpy.uint8, numpy.uint16])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_camera_may_have_been_held_in_any_way(tmp_path: Path, orientation: int, kind: type):
    upright = numpy.arange(15, dtype=kind).reshape(3, 5) * (numpy.iinfo(kind).max // 15)
    # What lies in the file where the standard (Exif 2.3, tag 0x0112) says which way row 0 and column 0 of it go.
    stored = {
        1: upright,
        2: upright[:, ::-1],  # its first column is the right-hand side
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,  # its first row is the left-hand side, its first column the top
        6: upright.T[::-1],
        7: upright.T[::-1, ::-1],
        8: upright.T[:, ::-1],
    }[orientation]
    about = Image.Exif()
    about[0x0112] = orientation
    Image.fromarray(numpy.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=about)
    (image,) = data.decode([tmp_path / "a.png"], None)
    expected = upright.astype(int) * 255 / numpy.iinfo(kind).max
    assert numpy.abs(image[0].numpy() - expected).max() <= 0.5


def test_a_missing_folder_and_a_single_class_are_refused(tmp_path: Path):
    with pytest.raises(EdgekitError, match="no such data folder"):
        data.load(Data(name=str(tmp_path / "nowhere")))
    (tmp_path / "one/ant").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "one/ant/a.png")
    with pytest.raises(EdgekitError, match="only one class"):
        data.load(Data(name=str(tmp_path / "one")))


def test_an_unreadable_image_is_no_broken_image(tmp_path: Path):
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    root = folder(tmp_path / "photos", count=6)
    (root / "train/ant/0.png").chmod(0)
    with pytest.raises(PermissionError):
        data.load(Data(name=str(root)))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(0, 70), st.integers(0, 3))
def test_a_stratified_draw_has_each_classs_share(labels: list[int], count: int, seed: int):
    tensor = torch.tensor(labels)
    drawn = data.stratified(tensor, count, seed)
    assert len(drawn) == min(count, len(labels))
    assert drawn.unique().numel() == len(drawn)
    for label in set(labels):
        share = labels.count(label) * len(drawn) / len(labels)
        assert abs((tensor[drawn] == label).sum().item() - share) < 1


def test_augmentation_crops_and_mirrors_each_sample_by_its_own_seed():
    images = torch.arange(30 * 2 * 5 * 5).reshape(30, 2, 5, 5) % 251 + 1
    images = images.to(torch.uint8)
    out = data.augment(images, INDEX, pad=2, flip=True)
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    seen = set()
    for image, source in zip(out, padded, strict=True):
        windows = {
            (row, column, mirrored): source[:, row : row + 5, column : column + 5].flip([2] if mirrored else [])
            for row in range(5)
            for column in range(5)
            for mirrored in (False, True)
        }
        matches = [key for key, window in windows.items() if window.equal(image)]
        assert matches
        seen.update(matches)
    assert len({row for row, _, _ in seen}) == 5
    assert {mirrored for _, _, mirrored in seen} == {False, True}
    assert data.augment(images[4:5], INDEX[4:5], pad=2, flip=True).equal(out[4:5])
    assert data.augment(images, INDEX, pad=0, flip=False).equal(images)
