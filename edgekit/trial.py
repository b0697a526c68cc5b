"""`python -m edgekit.trial WORD…`: tries one part of edgekit after the other, and prints of each what came of it.

A process of its own, which a runtime may hang or kill: `edgekit doctor` starts it, and reads one JSON line for each
word, {"trial", "found"} or {"trial", "fault", "mend"}. All that is tried is imported when it is tried.
"""

import errno
import importlib
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.errors import ENVIRONMENT, EdgekitError

if TYPE_CHECKING:
    import torch

    from edgekit.models import Network

# The share of their spread by which the scores of a file may differ from the network's: fp32, and int8.
ALLOWED = {"fp32": 1e-4, "fp16": 0.01, "int8": 0.1}
# Modules are mostly called as their packages are.
MODULES = {"scikit-learn": "sklearn", "pillow": "PIL", "protobuf": "google.protobuf"}
CUDA = "Install NVIDIA's driver for this GPU; nvidia-smi then lists it"


def package(name: str) -> str:
    """Import it, and give its version."""
    module = importlib.import_module(MODULES.get(name, name))
    return str(getattr(module, "__version__", "it loads"))


def digits() -> str:
    """The images that come with scikit-learn."""
    from sklearn.datasets import load_digits

    return f"{len(load_digits().target):,} images, part of scikit-learn"  # pyright: ignore


def gpu() -> str:
    """What the GPU is, once it has computed; "" where there is none.

    Raises:
        EdgekitError: (exit code 4) there is one that torch cannot use; why, and what mends it.
    """
    import torch

    from edgekit import machine

    if torch.cuda.is_available():
        chosen = machine.device("cuda")
        if torch.ones(8, 8, device=chosen).matmul(torch.ones(8, 8, device=chosen)).sum().item() != 512:
            raise EdgekitError("the GPU computes wrongly", mend=CUDA, exit_code=ENVIRONMENT)
        about = torch.cuda.get_device_properties(chosen)
        more = f", the first of {torch.cuda.device_count()}" if torch.cuda.device_count() > 1 else ""
        return f"{about.name}, {about.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}{more}"
    if torch.backends.mps.is_available():
        machine.device("mps")
        return "Apple's (mps)"
    if not nvidia():
        return ""
    if torch.version.cuda is None:
        raise EdgekitError(
            "this build of torch is for the CPU alone",
            mend="pip install --force-reinstall torch torchvision",
            exit_code=ENVIRONMENT,
        )
    if (hidden := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        raise EdgekitError(
            f"CUDA_VISIBLE_DEVICES is '{hidden}'", mend="unset CUDA_VISIBLE_DEVICES", exit_code=ENVIRONMENT
        )
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        raise EdgekitError(str(error).splitlines()[0][:200], mend=CUDA, exit_code=ENVIRONMENT) from None
    raise EdgekitError("torch sees no device that it can use", mend=CUDA, exit_code=ENVIRONMENT)


def nvidia(devices: Path = Path("/sys/bus/pci/devices"), driver: Path = Path("/proc/driver/nvidia/gpus")) -> bool:
    """Whether an NVIDIA GPU is in this machine: as its driver says, or as an unused device on its bus."""
    if driver.is_dir() and any(driver.iterdir()):
        return True
    kinds = {path.parent: path.read_text() for path in devices.glob("*/class")}
    # 0x03 is a display controller, in PCI's own list of classes; 0x10de is NVIDIA.
    return any(
        kind.startswith("0x03") and (place / "vendor").read_text().strip() == "0x10de" for place, kind in kinds.items()
    )


def format(name: str) -> str:
    """Write a small network in the precisions that the format has, open each file again and compare the answers.

    Raises:
        EdgekitError: a file does not answer as the network does, or is not in integers where it should be.
    """
    import torch

    from edgekit.formats import FORMATS, lacking
    from edgekit.judge import runtime

    missing = lacking(name)
    torch.set_num_threads(1)
    network = small()
    images = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network(images)
    spread = (expected.max() - expected.min()).item()
    for precision in FORMATS[name].PRECISIONS:
        with tempfile.TemporaryDirectory(prefix="edgekit-doctor-") as scratch:
            if precision == "int8":
                _write_int8(network, images, name, Path(scratch))
            else:
                FORMATS[name].write(network, Path(scratch), {}, precision)
            for file in FORMATS[name].OPENED if missing is None else ():
                answered = FORMATS[name].open(Path(scratch) / file, threads=1)(images)
                _compare(answered, expected, spread * ALLOWED[precision], f"{precision}, {file}")
    *others, last = FORMATS[name].PRECISIONS
    tried = f"{', '.join(others)} and {last}" if others else last
    if missing is not None:
        return f"{tried}: written and checked, not run: {FORMATS[name].RUNTIME} needs {missing}, which is not here"
    return f"{tried}: written, opened and compared in {runtime(name)}"


def _write_int8(network: "Network", images: "torch.Tensor", name: str, folder: Path) -> None:
    from edgekit import quantize
    from edgekit.formats import FORMATS, lacking, onnx

    format = FORMATS[name]
    made = quantize.quantize(onnx.lower(network), images, quantize.SCHEMES[FORMATS[name].SCHEME]).model
    format.write_model(quantize.slim(made) if name == "onnx" else made, folder, {}, "int8")
    if lacking(name) is None and not format.running(folder / format.FILE)["int8"]:
        raise EdgekitError(f"int8: {format.RUNTIME} runs none of its operators on integers")


def _compare(answered: "torch.Tensor", expected: "torch.Tensor", allowed: float, where: str) -> None:
    if answered.shape != expected.shape:
        raise EdgekitError(f"{where} answers scores of shape {tuple(answered.shape)}, not {tuple(expected.shape)}")
    away = (answered - expected).abs().max().item()
    if not away <= allowed:  # no number is not near either
        raise EdgekitError(f"{where} answers otherwise than the network: scores differ by {away:.2g}")


def small() -> "Network":
    """A network of one convolution and one linear layer for images (3, 8, 8), weights drawn from a fixed seed."""
    import torch
    from torch import nn

    from edgekit.models import Network
    from edgekit.recipe import Student

    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(), nn.AdaptiveAvgPool2d(1)]
    body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 4))
    spec = Student(architecture="mobilenetv2")
    return Network(body, spec, ("a", "b", "c", "d"), (3, 8, 8), (0.5,) * 3, (0.25,) * 3).eval()


def processor(name: str) -> str:
    """An emulated processor's own runtime, started.

    Raises:
        EdgekitError: (exit code 4) it is not set up, or does not start.
    """
    from edgekit import processors

    mend = processors.command([name])
    if not processors.ready(name):
        raise EdgekitError(f"not set up; --on {name} needs it", mend=mend, exit_code=ENVIRONMENT)
    try:
        processors.probe(name)
    except EdgekitError as error:
        raise EdgekitError(error.what, mend=f"Remove its folder, then {mend}", exit_code=ENVIRONMENT) from None
    return processors.runtime(name)


TRIALS: dict[str, Callable[..., str]] = {
    "package": package,
    "digits": digits,
    "gpu": gpu,
    "format": format,
    "processor": processor,
}


def tried(word: str) -> dict[str, str | None]:
    """What came of one word, such as "format:onnx"."""
    name, _, argument = word.partition(":")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return {"trial": word, "found": TRIALS[name](*filter(None, [argument]))}
    except EdgekitError as error:
        return {"trial": word, "fault": error.what, "mend": error.mend}
    except Exception as error:  # whatever a broken package raises: that it is broken is what is asked
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            return {"trial": word, "fault": f"{error.strerror}", "mend": "Free space, or set TMPDIR to another folder"}
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        return {"trial": word, "fault": f"{type(error).__name__}: {said}"[:200], "mend": None}


def main() -> None:
    """Try the words of the command line in turn."""
    # What a runtime prints must not get among the answers.
    answers = os.dup(1)
    os.dup2(2, 1)
    for word in sys.argv[1:]:
        os.write(answers, json.dumps(tried(word)).encode() + b"\n")
    os._exit(0)  # past the destructors of the runtimes, some of which crash


if __name__ == "__main__":
    main()
