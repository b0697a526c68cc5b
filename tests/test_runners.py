"""What runs on a device with no edgekit: the same answers and verdict as here, and one sentence for what is wrong."""

import http.client
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from browsing import CHROMIUM, Tab
from PIL import Image, ImageOps
from saturating import HOME
from torch import Tensor

import edgekit
from edgekit import artifact, data, judge, processors
from edgekit.formats import FORMATS
from edgekit.recipe import read

RUNNERS = Path(__file__).parents[1] / "export" / "runners"
CLASSIFY = RUNNERS / "python" / "classify.py"
WEB = HOME / f"wasm-{processors.WEB}" / "package" / "dist"
CONNECTED = "document.getElementById('judge')?.textContent.startsWith('Connected')"
SAMPLES = 10


@pytest.fixture(scope="module")
def artifacts(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifacts of a run of its own, whose verdicts may be written."""
    place = tmp_path_factory.mktemp("device")
    shutil.copytree(workplace / "runs" / "tiny-1", place / "run")
    return place / "run" / "artifacts"


@pytest.fixture(scope="module")
def openvino(artifacts: Path) -> Path:
    return written(artifacts, "openvino", "openvino")


@pytest.fixture(scope="module")
def images(artifacts: Path) -> Tensor:
    """Test digits, and noise, so that more than one batch is needed."""
    digits = data.load(read(artifacts.parent / "recipe.toml").data).test.floats()[:20]
    return torch.cat([digits, torch.rand(20, *digits.shape[1:], generator=torch.Generator().manual_seed(0))])


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A colored one that is wider than high, and larger than what the network takes."""
    pixels = numpy.random.default_rng(1).integers(0, 256, (11, 17, 3)).astype("uint8")
    path = tmp_path_factory.mktemp("picture") / "noise.png"
    Image.fromarray(pixels).resize((68, 44), Image.Resampling.BILINEAR).save(path)
    return path


@pytest.fixture(scope="module")
def cpp(openvino: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("cmake") is None or not (shutil.which("c++") or shutil.which("g++")):
        pytest.skip("no cmake or no C++ compiler is installed: apt-get install cmake g++")
    package = pytest.importorskip("openvino")
    build = tmp_path_factory.mktemp("build")
    made = [["-S", RUNNERS / "cpp", "-B", build, "-DCMAKE_BUILD_TYPE=Debug"], ["--build", build]]
    for words in made:
        environment = os.environ | {"OpenVINO_DIR": str(Path(package.__path__[0]) / "cmake")}
        done = subprocess.run(["cmake", *words], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "warning" not in done.stderr
    return build / "classify"


@pytest.fixture(scope="module")
def page(artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator["Open"]:
    if CHROMIUM is None:
        pytest.skip("no chromium is installed: apt-get install chromium")
    if not (WEB / "ort.wasm.bundle.min.mjs").is_file():
        pytest.skip("onnxruntime-web is not set up here: make processors NAMES=wasm")
    words = [sys.executable, "-u", RUNNERS / "browser" / "serve.py", artifacts / "onnx-int8", "--ort", WEB]
    with running(words) as server:
        assert server.stdout
        link = server.stdout.readline().split()[-1]
        with Tab(tmp_path_factory.mktemp("profile"), link) as tab:
            tab.wait(CONNECTED)
            yield Open(tab, link, server.stdout.readline().split()[-1])


class Open:
    """The page in a browser, the link that opened it, and the address of its judge."""

    def __init__(self, tab: Tab, link: str, judge: str) -> None:
        self.tab, self.link, self.judge = tab, link, judge


@contextmanager
def running(words: list[Any]) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        try:
            yield program
        finally:
            program.kill()


def written(artifacts: Path, format: str, package: str) -> Path:
    """The fp32 artifact of a format."""
    pytest.importorskip(package)
    edgekit.export(artifacts.parent, formats=format)
    return artifacts / f"{format}-fp32"


def local(folder: Path) -> Any:
    """The file of an artifact, as edgekit opens it in this process."""
    there = artifact.load(folder)
    return FORMATS[there.format].open(there.path, threads=1)


def prepared(path: Path) -> Tensor:
    """The picture as the network takes it, by pillow."""
    grey = ImageOps.fit(Image.open(path).convert("RGB").convert("L"), (8, 8), Image.Resampling.BICUBIC)
    return torch.from_numpy(numpy.array(grey)).float()[None, None] / 255


def likely(folder: Path, path: Path) -> list[tuple[str, float]]:
    """What a runner should print: five classes and their probabilities."""
    shares = local(folder)(prepared(path)).softmax(1)[0]
    top = shares.topk(5)
    return [(str(place), share) for place, share in zip(top.indices.tolist(), top.values.tolist(), strict=True)]


def printed(*words: object) -> list[tuple[str, float]]:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    return [(name, float(share)) for _, share, name in lines]


def close(found: list[tuple[str, float]], expected: list[tuple[str, float]], within: float = 2e-6) -> bool:
    same = [name for name, _ in found] == [name for name, _ in expected]
    return same and all(abs(a - b) <= within for (_, a), (_, b) in zip(found, expected, strict=True))


def told(folder: Path, address: str | None = None) -> dict[str, Any]:
    """What a verdict says, without what names the judge and the seconds."""
    document = edgekit.verify(folder, attack="pgd20", samples=SAMPLES, judge=address)
    (one,) = document["artifacts"]
    keys = ("clean_accuracy", "robust_accuracy", "float_robust_accuracy", "change", "agreement", "verdict", "why")
    said = {key: one[key] for key in keys}
    said["attacks"] = [{key: attack[key] for key in ("name", "sources")} for attack in one["attacks"]]
    said["checks"] = {check["name"]: check["passed"] for check in one["checks"]}
    return said | {"whole": document["verdict"], "float": document["float"]}


@pytest.fixture(scope="module")
def verdicts(artifacts: Path) -> Iterator[dict[Path, dict[str, Any]]]:
    """What the local file is told, of each artifact that was asked for."""

    class Local(dict[Path, dict[str, Any]]):
        def __missing__(self, folder: Path) -> dict[str, Any]:
            self[folder] = told(folder)
            return self[folder]

    yield Local()


def python(folder: Path) -> list[object]:
    # -I: nothing of this checkout is on its path, and no edgekit is imported.
    return [sys.executable, "-I", CLASSIFY, folder]


@pytest.mark.parametrize(
    ("format", "package"),
    [("onnx", ""), ("openvino", "openvino"), ("litert", "ai_edge_litert"), ("ncnn", "ncnn")],
)
def test_python_answers_and_classifies_as_the_file_does_here(
    format: str, package: str, artifacts: Path, images: Tensor, picture: Path
):
    folder = written(artifacts, format, package) if package else artifacts / "onnx-int8"
    with judge.connect(" ".join(map(str, [*python(folder), "--threads", 1]))) as asked:
        assert asked(images).equal(local(folder)(images))
        assert asked(images[:0]).shape == (0, 10)
    assert close(printed(*python(folder), picture), likely(folder, picture))


def test_python_as_a_judge_over_tcp_gives_the_local_verdict(artifacts: Path, verdicts: dict[Path, Any]):
    folder = artifacts / "onnx-int8"
    with running([*python(folder), "--serve", 0]) as server:
        assert server.stdout
        address = server.stdout.readline().strip()
        assert address.startswith("tcp://127.0.0.1:")
        assert told(folder, address) == verdicts[folder]


def test_what_is_wrong_with_an_artifact_is_one_sentence_in_python(artifacts: Path, tmp_path: Path):
    folder = tmp_path / "artifact"

    def said(*words: object) -> tuple[int, str]:
        done = subprocess.run(
            [str(word) for word in (*python(folder), *words)], input="", capture_output=True, text=True
        )
        assert done.stderr.count("\n") == 1, done.stderr
        return done.returncode, done.stderr

    assert said() == (2, f"{folder}/artifact.json: No such file or directory\n")
    shutil.copytree(artifacts / "onnx-int8", folder)
    with (folder / "model.onnx").open("r+b") as file:
        file.write(b"\1")
    status, sentence = said()
    assert (status, "is not the file that was exported" in sentence) == (2, True)
    (folder / "artifact.json").write_text('{"format": "onnx"}')
    assert "is no description of an artifact" in said()[1]
    shutil.copy(artifacts / "onnx-int8" / "artifact.json", folder)
    shutil.copy(artifacts / "onnx-int8" / "model.onnx", folder)
    (tmp_path / "text.jpg").write_text("no picture")
    assert "text.jpg cannot be read" in said(tmp_path / "text.jpg")[1]
    assert said("--serve", "here")[1] == "--serve here: write PORT or HOST:PORT\n"


def test_a_request_that_is_none_ends_its_conversation_and_not_the_judge(artifacts: Path, images: Tensor):
    with running([*python(artifacts / "onnx-int8"), "--serve", 0]) as server:
        assert server.stdout
        address = server.stdout.readline().strip()
        for hostile in (struct.pack("<4I", *4 * [2**32 - 1]), b"\1\0", struct.pack("<4I", 1, 3, 8, 8) + bytes(768)):
            with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), 20) as wire:
                wire.sendall(hostile)
                wire.shutdown(socket.SHUT_WR)
                assert wire.recv(1) == b""
        with judge.connect(address) as asked:
            assert asked(images).equal(local(artifacts / "onnx-int8")(images))


def test_cpp_answers_and_classifies_as_the_file_does_here(
    cpp: Path, openvino: Path, images: Tensor, picture: Path, tmp_path: Path
):
    with judge.connect(f"{cpp} {openvino} --threads 1") as asked:
        assert asked(images).equal(local(openvino)(images))
        assert asked(images[:0]).shape == (0, 10)
    Image.open(picture).convert("RGB").save(tmp_path / "color.ppm")
    assert close(printed(cpp, openvino, tmp_path / "color.ppm"), likely(openvino, picture))
    Image.open(picture).convert("L").save(tmp_path / "grey.pgm")
    assert close(printed(cpp, openvino, tmp_path / "grey.pgm"), likely(openvino, tmp_path / "grey.pgm"))


def test_cpp_as_a_judge_over_tcp_gives_the_local_verdict(cpp: Path, openvino: Path, verdicts: dict[Path, Any]):
    with running([cpp, openvino, "--serve", 0]) as server:
        assert server.stdout
        address = server.stdout.readline().strip()
        assert address.startswith("tcp://127.0.0.1:")
        for hostile in (struct.pack("<4I", *4 * [2**32 - 1]), b"\1\0"):
            with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), 20) as wire:
                wire.sendall(hostile)
                wire.shutdown(socket.SHUT_WR)
                assert wire.recv(1) == b""
        assert told(openvino, address) == verdicts[openvino]


def test_what_is_wrong_with_an_artifact_is_one_sentence_in_cpp(cpp: Path, openvino: Path, tmp_path: Path):
    folder = tmp_path / "artifact"
    shutil.copytree(openvino, folder)

    def said(*words: object) -> str:
        done = subprocess.run([str(word) for word in (cpp, folder, *words)], input="", capture_output=True, text=True)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        return done.stderr

    (tmp_path / "short.ppm").write_bytes(b"P6\n# a comment\n4 4\n255\nabc")
    assert said(tmp_path / "short.ppm").endswith("short.ppm: the picture is cut short\n")
    record = (folder / "artifact.json").read_text()
    for broken, fault in (
        (record[:-20], "it is no valid JSON"),
        (record.replace('"classes"', '"klasses"'), 'there is no "classes"'),
        ("[" * 100_000, "it is no valid JSON"),
        (record.replace('"openvino"', '"onnx"', 1), "this runner opens openvino alone"),
    ):
        (folder / "artifact.json").write_text(broken)
        assert fault in said()
    (folder / "artifact.json").write_text(record)
    (folder / "model.xml").write_bytes((folder / "model.xml").read_bytes()[:3000])
    assert said()


def test_the_link_opens_once_and_for_one_browser(page: Open):
    origin = page.link.partition("/?")[0]
    assert page.tab.evaluate("location.href") == f"{origin}/"  # the key has left the address bar
    port = int(origin.rpartition(":")[2])

    def status(path: str, headers: dict[str, str]) -> int:
        wire = http.client.HTTPConnection("127.0.0.1", port, timeout=20)  # it follows no redirection
        wire.request("GET", path, headers=headers)
        return wire.getresponse().status

    assert {status(path, {}) for path in (page.link.removeprefix(origin), "/", "/model.onnx", "/judge")} == {403}
    listening = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if " 0A " in line]
    for one in (port, int(page.judge.rpartition(":")[2])):
        assert [local for local in listening if local.endswith(f":{one:04X}")] == [f"0100007F:{one:04X}"]
    # A page of another port of this host would have the cookie, and not the origin.
    (cookie,) = page.tab.ask("Network.getCookies", urls=[origin])["cookies"]
    assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
    known = {"Cookie": f"{cookie['name']}={cookie['value']}"}
    assert status("/", known) == 200
    foreign = known | {"Origin": "http://127.0.0.1:1", "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA=="}
    assert status("/judge", foreign) == 400


def test_the_page_classifies_a_picture_and_fits_a_phone(page: Open, artifacts: Path, picture: Path):
    assert page.tab.evaluate("document.getElementById('classes').children.length") == 0
    page.tab.pick("#file", picture)
    page.tab.wait("document.getElementById('classes').children.length == 5")
    found = page.tab.evaluate(
        "[...document.querySelectorAll('li')].map(one => [one.firstChild.textContent, Number(one.dataset.share)])"
    )
    assert close([tuple(one) for one in found], likely(artifacts / "onnx-int8", picture), within=1e-5)
    for width in (390, 320):
        size = {"width": width, "height": 700, "deviceScaleFactor": 1, "mobile": True}
        page.tab.ask("Emulation.setDeviceMetricsOverride", **size)
        assert page.tab.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [width, width]
    assert page.tab.evaluate("document.getElementById('fault').textContent") == ""


def test_a_page_that_is_closed_judges_no_more_until_it_is_opened_again(page: Open, artifacts: Path, images: Tensor):
    page.tab.ask("Page.navigate", url="about:blank")
    with judge.connect(page.judge) as asked, pytest.raises(edgekit.EdgekitError, match="closed the connection"):
        asked(images)
    page.tab.ask("Page.navigate", url=page.link.partition("?")[0])
    page.tab.wait(CONNECTED)
    with judge.connect(page.judge) as asked:
        assert asked(images).allclose(local(artifacts / "onnx-int8")(images), atol=1e-5)


def test_the_page_as_a_judge_gives_the_local_verdict(
    page: Open, artifacts: Path, images: Tensor, verdicts: dict[Path, Any]
):
    folder = artifacts / "onnx-int8"
    with judge.connect(page.judge) as asked:
        expected = local(folder)(images)
        assert asked(images).allclose(expected, atol=1e-5)
        many = images.repeat(500, 1, 1, 1)  # 5 MB: more than the page gets in one message
        assert asked(many).allclose(expected.repeat(500, 1), atol=1e-5)
    assert told(folder, page.judge) == verdicts[folder]
    assert re.match(
        r"Connected; 2\d,\d{3} images answered", page.tab.evaluate("document.getElementById('judge').textContent")
    )
    with judge.connect(page.judge) as asked, pytest.raises(edgekit.EdgekitError, match="closed the connection"):
        asked(torch.rand(1, 3, 8, 8))
