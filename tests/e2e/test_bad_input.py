"""Bad input, typed at the command line: one sentence on stderr, its exit code, no traceback, nothing left behind."""

import shutil
from pathlib import Path

import pytest
import torch
from commandline import TINY, command
from PIL import Image


def refused(done, code: int, *said: str) -> None:
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert all(part in line for part in said), line


def test_recipes(tmp_path: Path):
    recipe = tmp_path / "bad.toml"
    for spoilt, *said in (
        (TINY.replace("epsilon", "epsilom"), "bad.toml, line 18", "'epsilom'", "Did you mean 'epsilon'?"),
        (TINY.replace("epsilon = 0.05", "epsilon = 1.5"), "line 18", "less than or equal to 1"),
        (TINY.replace("epsilon = 0.05", 'epsilon = "8/0"'), "line 18", "8/255"),
        (TINY.replace('"sat"', '"rsald"'), "Did you mean 'rslad'?"),
        (TINY.replace('"sat"', '"rslad"'), "needs a teacher"),
        (TINY.replace('name = "digits"', 'name = "nowhere"'), "nowhere: there is no such data folder"),
    ):
        recipe.write_text(spoilt)
        refused(command("distill", recipe, cwd=tmp_path), 2, *said)
    refused(command("distill", "recipes/mobilnet.toml", cwd=tmp_path), 2, "Did you mean 'recipes/mobilenet.toml'?")
    assert not (tmp_path / "runs").exists()


def test_teachers(tmp_path: Path, workplace: Path):
    class Bomb:
        def __reduce__(self):
            return (Path(tmp_path / "exploded").touch, ())

    torch.save({"student": Bomb()}, tmp_path / "bomb.pt")
    recipe = tmp_path / "taught.toml"
    recipe.write_text(TINY.replace('"sat"', '"rslad"') + '\n[teacher]\nweights = "bomb.pt"\n')
    refused(command("distill", recipe, cwd=tmp_path), 2, "bomb.pt", "not a valid safetensors file")
    assert not (tmp_path / "exploded").exists()
    for name in ("ant", "bee"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(30):
            Image.effect_noise((8, 8), 20 + number).save(tmp_path / "photos" / name / f"{number}.png")
    teacher = workplace / "runs/tiny-1/student.safetensors"
    recipe.write_text(
        TINY.replace('"sat"', '"rslad"').replace('"digits"', '"photos"') + f'\n[teacher]\nweights = "{teacher}"\n'
    )
    refused(command("distill", recipe, cwd=tmp_path), 2, "the teacher knows 10 classes, the data has 2")
    assert not (tmp_path / "runs").exists()


def test_data_folders(tmp_path: Path):
    recipe, photos = tmp_path / "photos.toml", tmp_path / "photos"
    recipe.write_text(TINY.replace('"digits"', '"photos"'))
    photos.mkdir()
    refused(command("distill", recipe, cwd=tmp_path), 2, "photos: there are no images", "train/CLASS/*.jpg")
    (photos / "ant").mkdir()
    for number in range(30):
        Image.effect_noise((8, 8), 20 + number).save(photos / "ant" / f"{number:02}.jpg")
    refused(command("distill", recipe, cwd=tmp_path), 2, "photos: there is only one class", "two folders or more")
    shutil.copytree(photos / "ant", photos / "bee")
    broken = photos / "bee" / "07.jpg"
    broken.write_bytes(broken.read_bytes()[:-40])
    cache = tmp_path / "cache"
    refused(command("distill", recipe, cwd=tmp_path, EDGEKIT_CACHE=str(cache)), 2, "bee/07.jpg: a broken image")
    assert not [path for path in cache.rglob("*") if path.is_file()]
    assert not (tmp_path / "runs").exists()


def test_nothing_there_yet(tmp_path: Path):
    refused(command("export", "--int8", cwd=tmp_path), 2, "Run: edgekit distill recipes/mobilenet.toml")
    refused(command("verify", cwd=tmp_path), 2, "edgekit distill")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["verify", "--attack", "pgd0"], "pgd0"),
        (["verify", "--attack", "pdg20"], "Did you mean 'pgd20'?"),
        (["verify", "--epsilon", "8/0"], "8/0"),
        (["verify", "--epsilon", "1.5"], "1.5"),
        (["export", "--format", "onx"], "Did you mean 'onnx'?"),
        (["distill", "tiny.toml", "--run", "runs/tiny-1"], "--resume"),
        (["distill", "tiny.toml", "--resume", "--seed", "5"], "seed"),
        (["distill", "tiny.toml", "--resume", "--set", "train.epochs=9"], "train.epochs"),
    ],
)
def test_options(workplace: Path, arguments: list[str], said: str):
    refused(command(*arguments, cwd=workplace), 2, said)


def test_a_file_changed_after_export(workplace: Path, tmp_path: Path):
    shutil.copytree(workplace, tmp_path / "place", symlinks=True)
    path = tmp_path / "place/runs/tiny-1/artifacts/onnx-int8/model.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    refused(command("verify", cwd=tmp_path / "place"), 2, "onnx-int8/model.onnx", "changed")
    refused(command("export", "--int8", cwd=tmp_path / "place"), 2, "onnx-int8/model.onnx", "--force")


def test_names_cannot_drive_the_terminal(tmp_path: Path):
    done = command("distill", "\x1b[2Jevil\u202e.toml", cwd=tmp_path)
    refused(done, 2, "\\x1b[2Jevil\\u202e.toml")
    assert "\x1b" not in done.stderr
