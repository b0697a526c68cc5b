"""Other processors, emulated on this machine: what they are, whether they are set up, and how they are set up.

QEMU's user mode runs the unmodified builds of ONNX Runtime: this machine's own with fewer instructions, and those for
ARM in a small root made of Debian's packages; node runs the build for browsers. So a file is judged by the real kernels
of another processor, bit for bit. Emulated speed says nothing about a device's, and is never reported.

`python -m edgekit.processors [NAME…]`, or `make processors`, sets them up in the cache folder: nothing is installed
into the system, and nothing without being asked. What is there already stays.
"""

import argparse
import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgekit.console import say
from edgekit.errors import ENVIRONMENT, EdgekitError, choose
from edgekit.files import cache_folder, write_text, writing_folder

NATIVE = "native"
WEB = "1.30.0"  # of onnxruntime-web; the other runtimes have the version that is installed here
_WEB_FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
NODE = 18  # the oldest that its modules load in
_SCRIPT = Path(__file__).parent / "judge" / "wasm.mjs"
# Debian's packages for the ARM root; what they depend on comes with them.
_PACKAGES = ("python3-minimal", "libpython3-stdlib", "libstdc++6", "libgomp1")
_TAGS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
# ONNX Runtime reads which ARM it runs on from /proc/cpuinfo, and fails on an x86 one: a Cortex-A76.
_CORE = """processor\t: {}
BogoMIPS\t: 50.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x4
CPU part\t: 0xd0b
CPU revision\t: 1

"""
# Settings for this machine's own kernels, which another processor's libraries would take for theirs.
_NOT_THERE = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONHOME")


@dataclass(frozen=True)
class Processor:
    """One that a file can be judged on.

    Attributes:
        name: as `--on` takes it.    about: what it is, in a few words.
        emulator: of QEMU's, "" where none is needed.    model: the processor that the emulator shows.
    """

    name: str
    about: str
    emulator: str = ""
    model: str = ""


PROCESSORS = {
    one.name: one
    for one in (
        Processor(NATIVE, "this machine"),
        Processor("x86-avx2", "x86 with AVX2 and without VNNI: 8-bit products summed in 16 bits", "qemu-x86_64", "max"),
        Processor("x86-sse", "x86 with SSE4.2 alone", "qemu-x86_64", "Nehalem"),
        Processor("arm64", "64-bit ARM with dot products: phones, Raspberry Pi 5", "qemu-aarch64", "cortex-a76"),
        Processor("wasm", "a browser's WebAssembly"),
    )
}
EMULATED = tuple(name for name in PROCESSORS if name != NATIVE)


def parse(names: str) -> tuple[str, ...]:
    """Such as "native,arm64" -> the processors, each once; native, which the attack runs on, always comes first.

    Raises:
        EdgekitError: there is no such processor.
    """
    asked = [name.strip() for name in names.split(",") if name.strip()]
    for name in asked:
        choose(PROCESSORS, name, "processor", where=f"--on {names}")
    return tuple(dict.fromkeys([NATIVE, *asked]))


def emulated(names: Iterable[str]) -> tuple[str, ...]:
    """Those of `names` that are processors beside this machine's own; what else a file was judged under is none."""
    return tuple(name for name in names if name in PROCESSORS and name != NATIVE)


def require(names: Sequence[str]) -> None:
    """See that all of them are set up.

    Raises:
        EdgekitError: (exit code 4) one is not; it names the command that does it.
    """
    missing = [name for name in names if not ready(name)]
    if missing:
        are = "are" if len(missing) > 1 else "is"
        raise EdgekitError(
            f"{' and '.join(missing)} {are} not set up on this machine",
            where=f"--on {','.join(names)}",
            mend=f"Run: {command(missing)}",
            exit_code=ENVIRONMENT,
        )


def command(names: Sequence[str]) -> str:
    """What sets processors up."""
    return f"python -m edgekit.processors {' '.join(names)}"


def ready(name: str) -> bool:
    """Whether the processor was set up, for the runtime that is installed here now."""
    return name == NATIVE or (_place(name) / "works").is_file()


def runtime(name: str) -> str:
    """The runtime and what runs it, such as "onnxruntime 1.32.0 under qemu-aarch64 -cpu cortex-a76"."""
    one = PROCESSORS[name]
    if name == "wasm":
        return f"onnxruntime-web {WEB} under node"
    under = f" under {one.emulator} -cpu {one.model}" if one.emulator else ""
    return f"onnxruntime {_installed('onnxruntime')}{under}"


def interpreter(name: str) -> tuple[list[str], list[str] | None]:
    """The command that runs that processor's Python, and the folders where it finds modules (None: those from here)."""
    one = PROCESSORS[name]
    clean = ["env", *(word for setting in _NOT_THERE for word in ("-u", setting))]
    emulator = [*clean, str(_qemu(one.emulator)), "-cpu", one.model]
    if name != "arm64":
        return [*emulator, sys.executable], None
    root = _place(name)
    return [*emulator, "-L", str(root), str(_python(root))], [str(root / "site")]


def web() -> list[str]:
    """The command that judges a file, named after it, as a browser would."""
    return ["node", str(_SCRIPT), str(_place("wasm") / "package" / "dist" / "ort.wasm.bundle.min.mjs")]


# Setting up -----------------------------------------------------------------------------------------------------------


def set_up(name: str) -> None:
    """Fetch what the processor needs into the cache folder and see that it runs; at once where that was done before.

    Raises:
        EdgekitError: (exit code 4) a program or a package that it needs is not to be had here.
    """
    if ready(name):
        return
    one = PROCESSORS[name]
    if one.emulator and not _qemu(one.emulator).is_file():
        _fetch_qemu()
    if name == "arm64":
        _fetch_arm(_place(name))
    elif name == "wasm":
        _fetch_web(_place(name))
    found = probe(name)
    write_text(_place(name) / "works", f"{found}\n")


def probe(name: str) -> str:
    """What the processor's own runtime says of itself.

    Raises:
        EdgekitError: (exit code 4) it does not start.
    """
    if name == "wasm":
        return _run([*web(), "--version"], f"{name} does not start")
    python, search = interpreter(name)
    code = "import platform, numpy, onnxruntime; print(platform.machine(), numpy.__version__, onnxruntime.__version__)"
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path if search is None else search))}
    return _run([*python, "-P", "-c", code], f"{name} does not start", environment)


def _fetch_qemu() -> None:
    """QEMU's static builds, unpacked from Debian's package."""
    _need("apt-get", "QEMU's user mode (qemu-user-static)")
    with writing_folder(_home() / "qemu") as folder:
        apt = _apt(folder / "apt")
        _run([*apt, "update"], "the list of Debian's packages cannot be had")
        _run([*apt, "download", "qemu-user-static"], "Debian's qemu-user-static cannot be had", cwd=folder)
        (package,) = folder.glob("*.deb")
        _unpack(package, folder / "all")
        shutil.rmtree(folder / "apt")
        # Of thirty emulators the two that are asked for are kept.
        for emulator in {one.emulator for one in PROCESSORS.values() if one.emulator}:
            (folder / "all" / "usr" / "bin" / f"{emulator}-static").rename(folder / emulator)
        shutil.rmtree(folder / "all")
        package.unlink()


def _apt(state: Path, architecture: str | None = None) -> list[str]:
    """apt-get with lists and packages in a folder of its own, whoever runs it: the system's are left alone."""
    for folder in ("lists/partial", "archives/partial"):
        (state / folder).mkdir(parents=True)
    options = {
        "Dir::State::lists": state / "lists",
        "Dir::State::status": "/dev/null",  # nothing counts as installed, so that all it takes is fetched
        "Dir::Cache": state,
        "APT::Sandbox::User": "root",
        "Acquire::Languages": "none",
    }
    if architecture is not None:
        options |= {"APT::Architecture": architecture, "APT::Architectures::": architecture}
    return ["apt-get", "-q", "-y", *(f"-o{key}={value}" for key, value in options.items())]


def _fetch_arm(place: Path) -> None:
    """A root of Debian's arm64 packages with a Python, and in its folder `site` the runtime's wheels."""
    _need("apt-get", "Debian's arm64 packages")
    with writing_folder(place) as root:
        state = root / "apt"
        apt = _apt(state, "arm64")
        _run([*apt, "update"], "the list of Debian's arm64 packages cannot be had")
        download = [*apt, "install", "--download-only", "--no-install-recommends", *_PACKAGES]
        _run(download, "Debian's arm64 packages cannot be had")
        for package in sorted((state / "archives").glob("*.deb")):
            _unpack(package, root)
        shutil.rmtree(state)
        (root / "proc").mkdir(exist_ok=True)
        (root / "proc" / "cpuinfo").write_text("".join(_CORE.format(core) for core in range(2)))
        version = _python(root).name.removeprefix("python")
        wheels = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
        wheels += ["--target", str(root / "site"), "--python-version", version, "--only-binary=:all:", "--no-deps"]
        wheels += [word for tag in _TAGS for word in ("--platform", tag)]
        wheels += [f"{package}=={_installed(package)}" for package in ("onnxruntime", "numpy")]
        _run(wheels, f"the arm64 builds of ONNX Runtime and numpy for Python {version} cannot be had")


def _fetch_web(place: Path) -> None:
    _need("node", "node")
    _need("npm", "npm")
    if int(_run(["node", "--version"], "node does not start").strip().lstrip("v").split(".")[0]) < NODE:
        raise EdgekitError("node is too old", where="wasm", mend=f"It takes version {NODE}", exit_code=ENVIRONMENT)
    with writing_folder(place) as folder:
        pack = ["npm", "pack", f"onnxruntime-web@{WEB}", "--silent"]
        _run(pack, f"onnxruntime-web {WEB} cannot be had", cwd=folder)
        (package,) = folder.glob("*.tgz")
        shutil.unpack_archive(package, folder, filter="data")
        package.unlink()
        for part in (folder / "package" / "dist").iterdir():
            if part.name not in _WEB_FILES:
                part.unlink()


def _unpack(package: Path, folder: Path) -> None:
    _need("dpkg", "dpkg")
    folder.mkdir(exist_ok=True)
    _run(["dpkg", "-x", str(package), str(folder)], f"{package.name} cannot be unpacked")


def _need(program: str, what: str) -> None:
    if shutil.which(program) is None:
        mend = "Set it up on a Debian or Ubuntu machine" if program != "node" else f"Install node {NODE} or newer"
        raise EdgekitError(f"{what}: there is no {program} here", mend=mend, exit_code=ENVIRONMENT)


def _run(words: Sequence[str], fault: str, environment: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    """What a program prints.

    Raises:
        EdgekitError: (exit code 4) it fails; its last line is repeated.
    """
    done = subprocess.run(
        words,
        env=os.environ | (environment or {}),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode:
        said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise EdgekitError(f"{fault} ({said[-1][:200] if said else done.returncode})", exit_code=ENVIRONMENT)
    return done.stdout.strip()


def _home() -> Path:
    return cache_folder() / "processors"


def _place(name: str) -> Path:
    """The folder of one processor, of its own for each version of what runs there."""
    if name == "wasm":
        return _home() / f"{name}-{WEB}"
    return _home() / f"{name}-{_installed('onnxruntime')}-numpy-{_installed('numpy')}"


def _qemu(emulator: str) -> Path:
    return _home() / "qemu" / emulator


def _python(root: Path) -> Path:
    """The root's python3.N, past the links to it, which are absolute."""
    found = sorted((root / "usr" / "bin").glob("python3.*[0-9]"))
    if not found:
        raise EdgekitError("Debian's arm64 packages hold no Python", exit_code=ENVIRONMENT)
    return found[0]


def _installed(package: str) -> str:
    return importlib.metadata.version(package)


def main() -> None:
    """Set processors up, each by itself: one that cannot be had here keeps no other one away."""
    parser = argparse.ArgumentParser(prog="python -m edgekit.processors", description="Set up processors for --on.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(EMULATED)}; all by default")
    parser.add_argument("--list", action="store_true", help="say what is set up, and set up nothing")
    arguments = parser.parse_args()
    names = arguments.names or EMULATED
    failed = 0
    for name in names:
        try:
            about = choose(PROCESSORS, name, "processor").about
            if not arguments.list:
                set_up(name)
            say(f"{name}: " + (f"ready ({about}; {runtime(name)})" if ready(name) else f"not set up ({about})"))
        except EdgekitError as error:
            say(f"{name}: cannot be set up here: {error}")
            failed = max(failed, error.exit_code)
    sys.exit(failed)


if __name__ == "__main__":
    main()
