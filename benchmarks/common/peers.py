"""An environment of their own for the libraries that edgekit is compared with: their pins must not bind edgekit."""

import subprocess
import sys
import sysconfig
from pathlib import Path

from edgekit.console import say
from edgekit.errors import ENVIRONMENT, EdgekitError

ROOT = Path(__file__).parents[2]
ENVIRONMENT_FOLDER = ROOT / ".venv-peers"


def python(*packages: str) -> Path:
    """The interpreter of .venv-peers, in which `packages` are installed; made where it is not there.

    torch and edgekit are seen there too, from this interpreter's own environment and after the peers' packages: both
    sides of a comparison run on one torch.

    Raises:
        EdgekitError: (exit code 4) the environment cannot be made.
    """
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
