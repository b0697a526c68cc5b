"""The protocol against judges in other languages, which answer as a formula says, and against judges that misbehave."""

import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from edgekit import judge
from edgekit.errors import EdgekitError
from edgekit.judge import Remote, remote

HERE = Path(__file__).parent
CLASSES = 7
IMAGES = torch.rand(9, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def linear(images: Tensor) -> Tensor:
    """What linear.cpp and linear.js answer."""
    place = torch.arange(images[0].numel())
    weights = torch.stack([((31 * k + 17 * place) % 13 - 6) / 8 for k in range(CLASSES)])
    return images.flatten(1).double() @ weights.double().T


def liar(how: str, *, seconds: float = 20) -> Remote:
    return judge.connect(f"{sys.executable} -S {HERE / 'liar.py'} {how}", seconds=seconds)


@pytest.fixture(scope="module")
def cpp(tmp_path_factory: pytest.TempPathFactory) -> str:
    compiler = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path_factory.mktemp("cpp") / "linear judge"  # with a space: the address is a command line
    subprocess.run([compiler, "-O1", "-o", program, HERE / "linear.cpp"], check=True)
    return f"'{program}'"


@pytest.fixture(scope="module")
def javascript() -> Iterator[str]:
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node")
    with subprocess.Popen([node, HERE / "linear.js"], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout
            yield f"tcp://127.0.0.1:{int(server.stdout.readline())}"
        finally:
            server.kill()


@pytest.mark.parametrize("language", ["cpp", "javascript"])
def test_a_judge_in_another_language_answers_as_the_formula_says(language: str, request: pytest.FixtureRequest):
    with judge.connect(request.getfixturevalue(language)) as asked:
        assert not asked.differentiable
        for count in (0, 1, 9, 4):
            answered = asked(IMAGES[:count])
            assert answered.shape == (count, CLASSES)
            assert answered.dtype == torch.float32
            assert answered.double().allclose(linear(IMAGES)[:count], atol=1e-5)
        # Whatever the memory behind a batch looks like, it goes out row by row.
        for view in (IMAGES.to(memory_format=torch.channels_last), IMAGES.flip(3)[::2], IMAGES.double()):
            assert asked(view).double().allclose(linear(view), atol=1e-5)
        wide = torch.rand(2, 1, 3, 50)
        assert asked(wide).double().allclose(linear(wide), atol=1e-5)


@pytest.mark.parametrize("language", ["cpp", "javascript"])
def test_a_large_batch_goes_in_messages_of_bounded_size(
    language: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
):
    sizes = []
    pack = remote.REQUEST.pack

    class Recorder:
        @staticmethod
        def pack(*shape: int) -> bytes:
            sizes.append(shape[0])
            return pack(*shape)

    monkeypatch.setattr(remote, "REQUEST", Recorder)
    monkeypatch.setattr(remote, "MESSAGE", 4 * IMAGES[0].numel() * 4 + 100)
    with judge.connect(request.getfixturevalue(language)) as asked:
        assert asked(IMAGES).double().allclose(linear(IMAGES), atol=1e-5)
        assert sizes == [4, 4, 1]
        monkeypatch.setattr(remote, "MESSAGE", 1)  # less than one image
        assert asked(IMAGES[:2]).double().allclose(linear(IMAGES[:2]), atol=1e-5)
        assert sizes[3:] == [1, 1]


def test_what_the_judge_is_asked_waits_for_its_answer(cpp: str):
    with judge.connect(cpp) as asked:
        with pytest.raises(RuntimeError):
            asked.answer()
        asked.ask(IMAGES[:3])
        with pytest.raises(RuntimeError):
            asked.ask(IMAGES[3:])
        assert asked.answer().double().allclose(linear(IMAGES[:3]), atol=1e-5)
        asked.ask(IMAGES[3:])
        assert asked.answer().double().allclose(linear(IMAGES[3:]), atol=1e-5)


def test_a_judge_that_answers_while_it_reads_is_no_standstill():
    with liar("eager") as asked:
        images = torch.zeros(400, 3, 32, 32)  # 4.9 MB there, 8 MB back: more than any pipe holds
        assert asked(images).eq(0.5).all()
        assert asked(images).shape == (400, 5000)


SENTENCES = {
    "closes": "the judge ended with exit status 0 before (its answer to|it had read) 9 images of 3x8x8",
    "rows": "the judge answered 10 rows of scores to 9 images",
    "transposed": "the judge answered 3 rows of scores to 9 images",
    "changes": "the judge answered 4 scores for each image, and 3 before",
    "nothing": "the judge answered 0 scores for each image; 1 to 100,000 are believed",
    "endless": "the judge answered 4,294,967,295 scores for each image; 1 to 100,000 are believed",
    "nan": r"the judge answered scores that are infinite or no numbers \(image 9 of 9\)",
    "inf": r"the judge answered scores that are infinite or no numbers \(image 9 of 9\)",
    "-inf": r"the judge answered scores that are infinite or no numbers \(image 9 of 9\)",
    "more": "the judge sent 1 byte more than its answer has",
    "later": "the judge sent 4 bytes that nobody asked for",
    "unasked": "the judge sent 1 byte that nobody asked for",
    "short": r"the judge ended with exit status 3 in the middle of its answer \(20 of 116 bytes\)",
    "once": r"the judge ended with exit status 0 (after its last answer|before it had read 9 images of 3x8x8)",
    "crashes": "the judge was killed by SIGSEGV before its answer to 9 images of 3x8x8",
    "mute": "the judge closed its output before its answer to 9 images of 3x8x8",
}


@pytest.mark.parametrize("how", SENTENCES)
def test_a_judge_that_misbehaves_is_one_sentence(how: str):
    asked = liar(how)
    with pytest.raises(EdgekitError) as caught:
        if how == "unasked":
            select.select([asked._line.reader], [], [], 20)
        for _ in range(2):  # some faults show only after the first answer
            asked(IMAGES)
            select.select([asked._line.reader], [], [], 0.5)
    sentence = str(caught.value)
    assert re.fullmatch(rf"--judge \S+ -S \S+liar.py {how}: {SENTENCES[how]}", sentence)
    assert caught.value.exit_code == 2
    assert _gone(asked)
    with pytest.raises(EdgekitError) as again:  # out of step: nothing that it says now is an answer
        asked(IMAGES)
    assert again.value is caught.value


def test_an_honest_judge_passes_all_of_this():
    with liar("honest") as asked:
        for _ in range(3):
            assert asked(IMAGES).equal(torch.full((9, 3), 0.5))
    assert _gone(asked)
    with pytest.raises(EdgekitError, match="has been closed"):
        asked(IMAGES)


@pytest.mark.parametrize("how", ["slow", "trickles", "noisy", "deaf", "parent"])
def test_a_slow_judge_is_told_by_the_clock(how: str):
    asked = liar(how, seconds=0.5)
    images = IMAGES if how != "deaf" else torch.zeros(400, 3, 32, 32)  # more than the pipe holds
    begin = time.monotonic()
    with pytest.raises(EdgekitError) as caught:
        asked(images)
    assert time.monotonic() - begin < 5
    task = "read 400 images of 3x32x32" if how == "deaf" else "answer 9 images of 3x8x8"
    assert str(caught.value).endswith(f"{how}: the judge did not {task} within 0.5 s. Allow more `seconds`")
    assert _gone(asked)


def test_what_a_slow_judge_may_be_given_is_named():
    with pytest.raises(EdgekitError, match=r"within 0.1 s\. Say --patience$"):
        judge.connect(f"{sys.executable} -S {HERE / 'liar.py'} slow", seconds=0.1, longer="Say --patience")(IMAGES)


def test_the_time_between_question_and_answer_is_not_the_judges():
    with liar("honest", seconds=0.3) as asked:
        asked.ask(IMAGES)
        time.sleep(0.6)  # this process is busy with a gradient
        assert asked.answer().shape == (9, 3)


def test_last_words_are_repeated_but_drive_no_terminal():
    with pytest.raises(EdgekitError) as caught:
        liar("hostile")(IMAGES)
    sentence = str(caught.value)
    assert "ended with exit status 9 before its answer to 9 images of 3x8x8; its last words: " in sentence
    assert r"\x1b[2J\x1b]0;title\x07\u202eevil\u2066 100 % robust!!!" in sentence
    assert sentence.isprintable()
    assert "the first line" not in sentence
    assert len(sentence) < 800


def test_what_a_judge_has_started_ends_with_it():
    asked = liar("parent", seconds=0.3)
    group = _process(asked).pid
    with pytest.raises(EdgekitError):
        asked(IMAGES)
    deadline = time.monotonic() + 5
    while _members(group) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _members(group)


def test_a_judge_nobody_closes_ends_when_it_is_forgotten():
    asked = liar("honest")
    process = _process(asked)
    assert process.poll() is None
    del asked
    assert process.returncode == 0


def test_an_interruption_leaves_no_judge_that_is_out_of_step(monkeypatch: pytest.MonkeyPatch):
    asked = liar("slow")

    def interrupted(*_: object) -> set[int]:
        raise KeyboardInterrupt

    asked.ask(IMAGES)
    monkeypatch.setattr(remote, "ready", interrupted)
    with pytest.raises(KeyboardInterrupt):
        asked.answer()
    assert _gone(asked)
    with pytest.raises(EdgekitError, match="was interrupted"):
        asked(IMAGES)


@pytest.mark.parametrize(
    ("address", "sentence", "code"),
    [
        ("tcp://127.0.0.1:1", r"the judge cannot be reached \(Connection refused\). Start it first", 4),
        ("tcp://127.0.0.1", "not an address. Write tcp://HOST:PORT, such as tcp://127.0.0.1:5000", 2),
        ("tcp://:80", "not an address. .*", 2),
        ("tcp://localhost:65536", "not an address. .*", 2),
        ("tcp://localhost:²", "not an address. .*", 2),
        ("udp://127.0.0.1:80", "not a judge. Known: tcp://HOST:PORT, or a command line", 2),
        ("", "not a judge. .*", 2),
        ("'half a", r"not a command line \(No closing quotation\)", 2),
        ("/nowhere/judge --fast", r"the judge cannot be started \(No such file or directory\)", 4),
        ("/", r"the judge cannot be started \(Permission denied\)", 4),
    ],
)
def test_an_address_that_leads_nowhere_is_one_sentence(address: str, sentence: str, code: int):
    before = sum(1 for _ in Path("/dev/fd").iterdir())
    with pytest.raises(EdgekitError) as caught:
        judge.connect(address)
    assert re.fullmatch(f"--judge {re.escape(address)}: {sentence}", str(caught.value))
    assert caught.value.exit_code == code
    assert sum(1 for _ in Path("/dev/fd").iterdir()) == before


def _process(asked: Remote) -> subprocess.Popen[bytes]:
    process = asked._line.process
    assert process
    return process


def _gone(asked: Remote) -> bool:
    return _process(asked).returncode is not None


def _members(group: int) -> list[int]:
    """Processes of the group that run, zombies left out: fields 3 and 5 of /proc/PID/stat."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, theirs = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # ended meanwhile
            continue
        if int(theirs) == group and state != "Z":
            found.append(int(stat.parent.name))
    return found
