"""An environment of their own for the libraries that edgekit is compared with: their pins must not bind edgekit."""

import json
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Self

import numpy
import torch
from torch import Tensor

from edgekit.console import say
from edgekit.errors import ENVIRONMENT, EdgekitError

ROOT = Path(__file__).parents[2]
ENVIRONMENT_FOLDER = ROOT / ".venv-peers"
ATTACKERS = ("torchattacks==3.5.1", "foolbox==3.3.4")
QUANTIZERS = ("nncf==3.4.0",)


def python(*packages: str) -> Path:
    """The interpreter of .venv-peers, in which `packages` ("name==version") are installed; made where it is not there.

    This interpreter itself where it holds them all already, as on a machine that reaches no registry.

    torch and edgekit are seen there too, from this interpreter's own environment and after the peers' packages: both
    sides of a comparison run on one torch.

    Raises:
        EdgekitError: (exit code 4) the environment cannot be made.
    """
    if all(_here(*package.split("==")) for package in packages):
        return Path(sys.executable)
    interpreter = ENVIRONMENT_FOLDER / "bin" / "python"
    uv = [sys.executable, "-m", "uv"]
    try:
        if not interpreter.exists():
            say(f"Making {ENVIRONMENT_FOLDER.name}")
            subprocess.run([*uv, "venv", "--quiet", "--python", sys.executable, ENVIRONMENT_FOLDER], check=True)
        subprocess.run([*uv, "pip", "install", "--quiet", "--python", interpreter, *packages], check=True)
        code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
        site = Path(
            subprocess.run([interpreter, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise EdgekitError(
            f"the peers' environment cannot be made ({error})",
            where=ENVIRONMENT_FOLDER.name,
            mend="It needs uv (make .venv/.done installs it) and a package registry",
            exit_code=ENVIRONMENT,
        ) from None
    (site / "edgekit-own.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n{ROOT}\n", encoding="utf-8")
    return interpreter


def _here(name: str, wanted: str) -> bool:
    try:
        return version(name) == wanted
    except PackageNotFoundError:
        return False


def quantized(model: Path, calibration: Tensor, folder: Path, names: Sequence[str] = ()) -> dict[str, Path]:
    """The int8 files that the quantizers of quantizers.QUANTIZERS make of an fp32 ONNX file, by name, in `folder`.

    Args:
        calibration: (N, C, H, W) float32 in [0, 1].
        names: of the quantizers; all of them by default.
    Raises:
        EdgekitError: (exit code 4) a quantizer died.
    """
    given = folder / "calibration.npy"
    numpy.save(given, calibration.contiguous().numpy())
    words = [python(*QUANTIZERS), Path(__file__).parent / "quantizers.py", model, given, folder, *names]
    if subprocess.run([str(word) for word in words]).returncode:
        raise EdgekitError("a quantizer died; what it said stands above", exit_code=ENVIRONMENT)
    return {path.stem: path for path in sorted(folder.glob("*.onnx"))}


class Attackers:
    """torchattacks and Foolbox in a process of their own, on one student; a context manager.

    Args:
        student: its .safetensors file.
        threads: of torch, in that process.
    """

    def __init__(self, student: Path, *, threads: int) -> None:
        self._words = [
            str(word) for word in (python(*ATTACKERS), Path(__file__).parent / "rivals.py", student, threads)
        ]

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory()
        self._process = subprocess.Popen(self._words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()

    def run(
        self, attack: str, images: Tensor, labels: Tensor, *, epsilon: float, steps: int, seed: int = 0
    ) -> tuple[Tensor, float]:
        """Adversarial images (N, C, H, W), on the device of `images`, and the seconds that the attack took.

        Args:
            attack: a key of rivals.RIVALS.
            images, labels: (N, C, H, W) float32 in [0, 1], (N,) int64.
        Raises:
            EdgekitError: the other process died.
        """
        given, found = Path(self._folder.name) / "images.npz", Path(self._folder.name) / "adversarial.npz"
        numpy.savez(given, images=images.cpu().numpy(), labels=labels.cpu().numpy())
        request = {"attack": attack, "images": str(given), "adversarial": str(found), "device": images.device.type}
        request |= {"epsilon": epsilon, "steps": steps, "seed": seed}
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("no pipes")
        print(json.dumps(request), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise EdgekitError(f"{attack} died; what it said stands above", exit_code=ENVIRONMENT)
        with numpy.load(found) as archive:
            return torch.from_numpy(archive["adversarial"]).to(images.device), json.loads(line)["seconds"]
