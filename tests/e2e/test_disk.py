"""A disk that fills up, for real: a small tmpfs, where this machine lets us mount one."""

import errno
import subprocess
from pathlib import Path

import pytest
import torch
from commandline import TINY, command
from networks import network

from edgekit import models
from edgekit.runs import Run
from edgekit.train import _save_checkpoint


@pytest.fixture
def small(tmp_path: Path):
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("no right to mount a tmpfs here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_is_one_sentence_and_resume_goes_on(small: Path):
    (small / "tiny.toml").write_text(TINY)
    done = command("distill", "tiny.toml", cwd=small)
    assert done.returncode == 4, done.stderr
    assert "No space left on device" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not [path for path in small.rglob("*.part")]
    subprocess.run(["mount", "-o", "remount,size=64m", small], check=True)
    done = command("distill", "tiny.toml", "--resume", cwd=small)
    assert done.returncode == 0, done.stderr
    assert (small / "runs/tiny-1/student.safetensors").is_file()


@pytest.mark.parametrize("free", range(40, 680, 64))
def test_wherever_in_a_file_the_disk_ends_it_is_said_as_that(small: Path, free: int):
    """`free` KiB: fewer than the student takes, so that its weights as well as its checkpoint break off."""
    student = network()
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    kept = small / "earlier.safetensors"
    kept.write_bytes(bytes((1024 - 64 - free) * 1024))
    run = Run(small / "run")
    for write in (
        lambda: models.save(student, small / "student.safetensors"),
        lambda: _save_checkpoint(run, student, optimizer, [], {}, ""),
    ):
        with pytest.raises(OSError) as caught:
            write()
        assert caught.value.errno == errno.ENOSPC
    assert [path for path in small.rglob("*") if path.is_file()] == [kept]
