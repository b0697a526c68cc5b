"""Several processes give the verdict of one, bit for bit, and process 0 alone speaks."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy
import psutil
import pytest
import torch
from commandline import command
from test_foreign import desk, network, timeless  # noqa: F401 (desk is a fixture)

from edgekit import machine
from edgekit.attacks import campaign, parse
from edgekit.attacks.campaign import Forgetful, Outcome, confront
from edgekit.classifier import Wrapped
from edgekit.crew import Crew
from edgekit.errors import EdgekitError

WORDS = ("verify", "net.onnx", "--data", "photos", "--attack", "pgd5,nes20,pgd5-margin", "--epsilon", "2/255")
ACCELERATE = ("accelerate.commands.launch", "--num_processes", "2", "--cpu", "-m")
TORCHRUN = ("torch.distributed.run", "--nproc-per-node", "2", "-m")


class Store:
    """As much of torch's store as a crew asks for, for threads in the place of processes."""

    def __init__(self) -> None:
        self.held: dict[str, bytes] = {}

    def set(self, key: str, value: bytes | str) -> None:
        self.held[key] = value.encode() if isinstance(value, str) else value

    def check(self, keys: list[str]) -> bool:
        return all(key in self.held for key in keys)

    def get(self, key: str) -> bytes:
        return self.held[key]

    def delete_key(self, key: str) -> None:
        del self.held[key]


class Counting(Forgetful):
    def __init__(self) -> None:
        self.kept: list[tuple[str, str, int]] = []

    def keep(self, attack: str, source: str, chunk: int, part: campaign.Part) -> None:
        self.kept.append((attack, source, chunk))


def test_the_parts_go_round_and_make_the_same_outcome(monkeypatch) -> None:
    monkeypatch.setattr(campaign, "CHUNK", 10)
    model = Wrapped(network, differentiable=True)
    images = torch.rand(35, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = network(images).argmax(1)

    def run(memory: Any) -> Outcome:
        attacks = parse("pgd3,nes20,pgd3-margin")
        places = torch.arange(35)
        return confront(
            model, {"a": model, "b": model}, attacks, images, labels, places, seed=0, epsilon=0.02, memory=memory
        )

    store, counted, outcomes = Store(), [Counting() for _ in range(3)], {}
    crews = [Crew(3, store) for _ in range(3)]
    for number, crew in enumerate(crews):
        crew.rank = number

    def work(number: int) -> None:
        outcomes[number] = run(crews[number].share(counted[number]))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    alone, together = run(None), outcomes[0]
    assert 0 < alone.robust.sum() < 35
    for name in ("clean", "adversarial", "winner"):
        assert getattr(together, name).equal(getattr(alone, name))
    assert all(hit.equal(together.fooled[pair]) for pair, hit in alone.fooled.items())
    assert together.passes == alone.passes
    done = [set(one.kept) for one in counted]
    assert sorted(map(len, done)) == [6, 7, 7]  # of 5 pairs of an attack and a source, on 4 chunks each
    assert len(set.union(*done)) == 20
    assert not [key for key in store.held if key.count("/") == 2]  # what was handed over is not kept


def test_a_fault_of_a_helper_is_what_process_0_says() -> None:
    crew = Crew(2, Store())
    crew.store.set("fault/1", json.dumps({"what": "the judge is gone", "exit_code": 4}))
    with pytest.raises(EdgekitError, match="the judge is gone") as caught:
        crew.receive(1)
    assert caught.value.exit_code == 4


def launched(desk: Path, launcher: tuple[str, ...], *words: str) -> subprocess.CompletedProcess[str]:  # noqa: F811
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return subprocess.run(
        [sys.executable, "-m", *launcher, "edgekit", *words],
        cwd=desk,
        env=environment | {"NO_COLOR": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("launcher", [ACCELERATE, TORCHRUN], ids=["accelerate", "torchrun"])
def test_two_processes_give_the_verdict_of_one_and_one_of_them_speaks(desk, launcher) -> None:  # noqa: F811
    two = launched(desk, launcher, *WORDS, "--json", "--save-adversarial", "two.npz")
    assert two.returncode == 0, two.stderr
    assert two.stderr.count("Kept in edgekit-verdicts/1") == 1
    kept = (desk / "edgekit-verdicts" / "1" / "samples.jsonl").read_bytes()
    (desk / "edgekit-verdicts").rename(desk / "other")
    one = command(*WORDS, "--json", "--save-adversarial", "one.npz", cwd=desk)
    assert timeless(json.loads(two.stdout)) == timeless(json.loads(one.stdout))
    assert kept == (desk / "edgekit-verdicts" / "1" / "samples.jsonl").read_bytes()
    with numpy.load(desk / "one.npz") as ours, numpy.load(desk / "two.npz") as theirs:
        assert all((ours[name] == theirs[name]).all() for name in ours.files)
    assert not list(desk.glob("other/.*"))


def test_several_processes_resume_what_one_began_and_refuse_with_one_sentence(desk, monkeypatch) -> None:  # noqa: F811
    from edgekit import archive, verifier

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(desk)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(archive, "keep", killed)
        verifier.verify("net.onnx", data="photos", attack="pgd5,nes20,pgd5-margin", epsilon="2/255")
    two = launched(desk, ACCELERATE, *WORDS, "--json", "--resume")
    assert "3 finished parts are taken up" in two.stderr
    assert json.loads(two.stdout)["looks"] == 1
    refused = launched(desk, TORCHRUN, *WORDS, "--json", "--judge", "tcp://127.0.0.1:9")
    assert refused.returncode != 0 and not refused.stdout
    assert refused.stderr.count("edgekit: ") == 1
    refused = launched(desk, TORCHRUN, *WORDS, "--epsilon", "7")
    assert refused.stderr.count("edgekit: --epsilon 7: an Linf epsilon is above 0") == 1


@pytest.mark.parametrize(
    ("words", "count"),
    [("--num_processes 3 --cpu", 3), ("--num-processes=2 x.py --num_processes 9", 2), ("--cpu x.py", 0),
     ("--num_processes 2 --num_machines 2", 0), ("--num_machines 1 --num_processes 4", 4)],
)  # fmt: skip
def test_accelerate_on_cpus_is_asked_how_many_it_was_told_to_start(monkeypatch, words, count) -> None:
    assert machine.asked_of_accelerate() == 1
    monkeypatch.setattr(psutil.Process, "cmdline", lambda self: ["accelerate", "launch", *words.split()])
    assert machine.asked_of_accelerate() == 1
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert machine.asked_of_accelerate() == count


def test_distill_refuses_what_accelerate_was_asked_for(tmp_path) -> None:
    from commandline import TINY

    (tmp_path / "tiny.toml").write_text(TINY)
    done = launched(tmp_path, ACCELERATE, "distill", "tiny.toml")
    assert done.returncode != 0
    assert "edgekit: this version trains in one process, and 2 were asked for" in done.stderr
    assert not (tmp_path / "runs").exists()
