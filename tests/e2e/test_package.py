"""What a user installs: the wheel, in an empty folder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_carries_recipes_schemas_and_the_licence(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    for wanted in ("edgekit/shipped/recipes/mobilenet.toml", "edgekit/schemas/verdict.json", "edgekit/py.typed"):
        assert wanted in names
    runners = {name.removeprefix("edgekit/shipped/export/runners/") for name in names if "/runners/" in name}
    assert {"python/classify.py", "cpp/CMakeLists.txt", "browser/index.html", "browser/page.js"} <= runners
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests/", "benchmarks/")) for name in names)


def test_the_wheel_works_in_an_empty_folder(wheel: Path, tmp_path: Path):
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    # The wheel's own files stand before the checkout's; what it depends on comes from this environment.
    environment = os.environ | {"PYTHONPATH": str(site), "COLUMNS": "200"}

    def typed(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "edgekit", *arguments]
        return subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True)

    where = subprocess.check_output(
        [sys.executable, "-c", "import edgekit; print(edgekit.__file__)"], cwd=empty, env=environment
    )
    assert Path(where.decode().strip()).is_relative_to(site)
    assert typed("--help").returncode == 0
    overrides = ["--set", "train.epochs=1", "--set", "method.name=sat", "--set", "student.width=0.25"]
    done = typed("distill", "recipes/mobilenet.toml", *overrides, "--set", "inner.steps=1", "--set", "evaluate.steps=1")
    assert done.returncode == 0, done.stderr
    assert (empty / "runs/mobilenet-1/student.safetensors").is_file()
