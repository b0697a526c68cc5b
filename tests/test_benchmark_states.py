"""A benchmark that goes on after a kill takes up only what the same recipes and the same code have made."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

import edgekit
from edgekit.errors import EdgekitError

ROOT = Path(edgekit.__file__).parents[1]
RECIPE = "recipes/mobilenet.toml"


@pytest.fixture
def benchmark(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.chdir(tmp_path)
    return importlib.import_module(request.param)


def edit_recipe(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "recipes").mkdir()
    (place / RECIPE).write_text((ROOT / RECIPE).read_text().replace("epochs = 30", "epochs = 3"))


def edit_code(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, changed = Path.read_bytes, ROOT / "edgekit/quantize/qdq.py"
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b"#" * (path == changed))


EDITS = pytest.mark.parametrize(("edit", "what"), [(edit_recipe, "recipes"), (edit_code, "code")])


@EDITS
@pytest.mark.parametrize("benchmark", ["seeds"], indirect=True)
def test_seeds(benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edit, what: str):
    place = tmp_path / "kept"
    for _ in range(2):
        benchmark.claim(place, ())
    edit(tmp_path, monkeypatch)
    with pytest.raises(EdgekitError, match=rf"settings\.json: .*other settings \({what}\)"):
        benchmark.claim(place, ())
    (place / "settings.json").unlink()
    (place / "0").mkdir()
    with pytest.raises(EdgekitError, match="does not say what made it"):
        benchmark.claim(place, ())


@EDITS
@pytest.mark.parametrize("benchmark", ["methods"], indirect=True)
def test_methods(benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edit, what: str):
    state = tmp_path / "methods.json"
    benchmark.Comparison(state, 3, False)._keep("teacher", {"seconds": 1.0})
    assert benchmark.Comparison(state, 3, False).state["teacher"] == {"seconds": 1.0}
    edit(tmp_path, monkeypatch)
    with pytest.raises(EdgekitError, match=rf"methods\.json: .*other settings \({what}\)"):
        benchmark.Comparison(state, 3, False)


@pytest.mark.parametrize("benchmark", ["methods"], indirect=True)
def test_a_finished_run_of_other_code_or_teacher_is_not_taken(benchmark: ModuleType, tmp_path: Path, monkeypatch):
    from edgekit.train import code_version

    comparison = benchmark.Comparison(tmp_path / "methods.json", 1, True)
    comparison._keep("teacher", {"seconds": 1.0, "student_sha256": "mine"})
    found = {"teacher": {"sha256": "mine"}, "versions": {"code": code_version()}}
    monkeypatch.setattr(edgekit, "distill", lambda *_, **__: json.loads(json.dumps(found)), raising=False)
    assert comparison._distill("rslad-0", RECIPE, [], 0) == found
    for spoilt in ({"teacher": {"sha256": "other"}}, {"versions": {"code": "other"}}):
        monkeypatch.setattr(edgekit, "distill", lambda *_, spoilt=spoilt, **__: found | spoilt, raising=False)
        with pytest.raises(EdgekitError, match="rslad-0: the run is of other code, or of another teacher"):
            comparison._distill("rslad-0", RECIPE, [], 0)
