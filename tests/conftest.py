"""Shared by all tests: one torch thread, a cache of their own, and one small trained run that many of them read."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commandline import LEARNT, command


@pytest.fixture(scope="session", autouse=True)
def _alone(tmp_path_factory: pytest.TempPathFactory) -> None:
    torch.set_num_threads(1)
    os.environ["EDGEKIT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a finished run of a small student, exported. Read-only: a test that writes works on a copy."""
    place = tmp_path_factory.mktemp("workplace")
    (place / "tiny.toml").write_text(LEARNT)
    for arguments in (["distill", "tiny.toml"], ["export", "--int8"]):
        done = command(*arguments, cwd=place)
        assert done.returncode == 0, done.stderr
    before = _files(place)
    yield place
    assert _files(place) == before, "a test wrote into the shared workplace"


def _files(place: Path) -> dict[str, int]:
    return {str(path.relative_to(place)): path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}
