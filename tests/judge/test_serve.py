"""The judge that ships with edgekit for a device with Python on it, over TCP."""

import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from graphs import convolutional

from edgekit import judge
from edgekit.errors import EdgekitError
from edgekit.formats import onnx as format
from edgekit.judge import serve

IMAGES = torch.linspace(0, 1, 2 * 192).view(2, 3, 8, 8)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convolutional(tmp_path_factory.mktemp("served") / "model.onnx")


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the server says on its stderr."""
    return tmp_path_factory.mktemp("said") / "stderr"


@pytest.fixture(scope="module")
def address(file: Path, said: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "edgekit.judge.serve", str(file), "--threads", "1"]
    with (
        said.open("w") as stderr,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as server,
    ):
        try:
            assert server.stdout
            yield server.stdout.readline().strip()
        finally:
            server.kill()


def port(address: str) -> int:
    return int(address.rpartition(":")[2])


def test_it_answers_as_the_file_does_here_and_listens_on_loopback_alone(file: Path, address: str):
    assert address.startswith("tcp://127.0.0.1:")
    images = torch.rand(30, 3, 8, 8)
    with judge.connect(address) as first, judge.connect(address) as second:  # neither keeps the other waiting
        for asked in (first, second, first):
            assert asked(images).equal(format.open(file, threads=1)(images))
    listening = [line.split()[1:4:2] for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    assert [local for local, state in listening if state == "0A" and local.endswith(f":{port(address):04X}")] == [
        f"0100007F:{port(address):04X}"
    ]


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (struct.pack("<4I", 1, 3, 2**14, 2**14), "a request announces 3,221,225,472 bytes of images"),
        (struct.pack("<4I", 1, 3, 16, 16) + b"half", "a request is cut short (4 of 3,072 bytes)"),
        (struct.pack("<4I", 1, 3, 16, 16), "a request ends after its header"),
        (b"GET /", "a request is cut short (5 of 16 bytes)"),
    ],
)
def test_a_request_that_is_none_closes_that_connection_and_no_other(
    address: str, said: Path, request_: bytes, sentence: str
):
    with judge.connect(address) as asked:
        before = asked(IMAGES)
        with socket.create_connection(("127.0.0.1", port(address)), timeout=20) as wire:
            wire.sendall(request_)
            wire.shutdown(socket.SHUT_WR)
            assert wire.recv(100) == b""
        assert asked(IMAGES).equal(before)
    assert sentence in said.read_text().splitlines()[-1]


def test_images_of_the_wrong_size_end_the_conversation_in_one_sentence(address: str):
    with pytest.raises(EdgekitError) as caught:
        judge.connect(address)(torch.zeros(2, 3, 20, 20))
    assert str(caught.value).endswith("the judge closed the connection before its answer to 2 images of 3x20x20")


def test_another_interface_is_listened_on_when_it_is_named(file: Path):
    scores = lambda pixels: pixels.reshape(len(pixels), -1)  # noqa: E731
    with serve.Server(scores, listen="127.0.0.2") as server:
        assert server.address.startswith("tcp://127.0.0.2:")
    with pytest.raises(EdgekitError, match=r"192\.0\.2\.1 port 0: cannot listen there") as caught:
        serve.Server(scores, listen="192.0.2.1")
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("port", ["70000", "-1"])
def test_what_cannot_be_served_is_one_sentence(file: Path, port: str):
    command = [sys.executable, "-m", "edgekit.judge.serve", str(file), "--port", port]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 4
    assert done.stderr.startswith(f"127.0.0.1 port {port}: cannot listen there")
    assert done.stderr.count("\n") == 1
