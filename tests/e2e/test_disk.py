"""A disk that fills up, for real: a small tmpfs, where this machine lets us mount one."""

import subprocess
from pathlib import Path

import pytest
from commandline import TINY, command


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
