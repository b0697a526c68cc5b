import dataclasses
import io

import numpy as np
import pytest
from rich.console import Console

from edgekit.report.terminal import to_table
from edgekit.verdict import (
    EXIT,
    AttackResult,
    Check,
    Data,
    FloatStudent,
    Machine,
    Rules,
    Twin,
    accuracy,
    judged,
    not_run,
    summarize,
)

CLEAN, ROBUST = np.arange(719) < 680, np.arange(719) < 500
HOSTILE = "[red]evil[/red]\x1b[2J\n\u202efile"


def file(robust=500, name="onnx-int8", rules=None, student=True, **more):
    beside = {"float_clean_right": CLEAN, "float_robust_right": ROBUST, "agreement": 0.985} if student else {}
    given = {
        "format": "onnx",
        "precision": "int8",
        "file": "a",
        "bytes": 912_345,
        "sha256": "0" * 64,
        "attacks": [AttackResult("pgd20", robust / 719, {"float": 0.71, "twin": 0.7}, 12.3)],
        "judged_on": "x86 avx512_vnni, onnxruntime 1.32.0",
        "twin": Twin(1.0, 0.0),
    }
    return judged(rules or Rules(), CLEAN, np.arange(719) < robust, name=name, **(given | beside | more))


def document(*files, rules=None, **more):
    given = {
        "attacks": ["pgd20"],
        "norm": "Linf",
        "epsilon": 8 / 255,
        "samples": 719,
        "seed": 0,
        "data": Data("digits", "test", "1" * 64),
        "machine": Machine("a cpu", "avx512_vnni", {"onnxruntime": "1.32.0"}),
    }
    return summarize(rules or Rules(), files, **(given | more))


def absent(name="tensorrt-int8"):
    same = {"format": "tensorrt", "precision": "int8", "file": "a", "bytes": 5_000_000, "sha256": "0" * 64}
    return not_run(name=name, why="there is no GPU here", command="edgekit verify a", **same)


def shown(verdict, width=80, colour=False):
    console = Console(
        file=io.StringIO(), width=width, force_terminal=colour, color_system="standard" if colour else None
    )
    console.print(to_table(verdict))
    return console.file.getvalue()


def words(verdict):
    """All that is shown, with every run of blanks as one, so that no assertion depends on where a line breaks."""
    return " ".join(shown(verdict).split())


def test_each_file_has_a_row_with_its_figures():
    student = FloatStudent(accuracy(CLEAN), accuracy(ROBUST))
    rows = shown(document(file(), file(robust=400, name="onnx-int8-b"), float_student=student)).splitlines()
    (first,) = (index for index, row in enumerate(rows) if row.startswith("onnx-int8-b "))
    assert rows[first].split() == ["onnx-int8-b", "912", "94.6", "%", "55.6", "%", "lost"]
    assert rows[first + 1].split() == ["+0.0", "[-0.5,", "+0.5]", "-13.9", "[-16.6,", "-11.6]"]
    assert any(row.split() == ["onnx-int8", "912", "94.6", "%", "69.5", "%", "survived"] for row in rows)
    assert any(row.startswith("float student") and row.split()[-5:] == ["94.6", "%", "69.5", "%", "–"] for row in rows)


def test_all_that_the_figures_rest_on_is_said():
    text = words(document(file(robust=490), looks=2))
    for said in (
        "pgd20 within Linf epsilon 8/255 on 719 test samples of digits, seed 0, look 2 at this data",
        "95 % intervals",
        "float 71.0 %, twin 70.0 %; 12.3 s",
        "float student under the same attacks: 69.5 %",
        "10 samples withstand only there, 0 only here (McNemar p 0.002)",
        "decides as the float student on 98.5 %",
        "twin decides as the file does on 100.0 %, bit for bit",
        "judged on x86 avx512_vnni, onnxruntime 1.32.0",
    ):
        assert said in text
    assert document(file(robust=490)).artifacts[0].why in text


def test_the_last_line_says_the_verdict_of_the_run_in_words():
    survived = words(document(file()))
    assert "SURVIVED: robustness survived in the file (asked: at most 2 points of robust and 2 points" in survived
    lost = words(document(file(), file(robust=300, name="b")))
    assert "LOST: b: falls short of what was asked" in lost
    inconclusive = words(document(file(robust=488), file(name="b")))
    assert "INCONCLUSIVE: onnx-int8: neither survival nor loss is shown" in inconclusive
    assert "does not mean that robustness was lost" in inconclusive
    assert "NOT RUN: tensorrt-int8: could not run here" in words(document(file(), absent()))
    assert "judge it there with: edgekit verify a" in words(document(file(), absent()))


def test_a_file_without_a_student_shows_its_own_interval():
    rules = Rules(at_least=0.6)
    text = words(document(file(rules=rules, student=False), rules=rules))
    assert "[66.1, 72.8]" in text
    assert "at least 60 % robust" in text
    assert "change" not in text
    assert "MEASURED: measured, and held against nothing" in words(document(file(student=False)))


def test_a_failed_check_is_named():
    text = words(document(file(checks=[Check("gradients_alive", False, 0.0, "all are zero")])))
    assert "the check gradients_alive failed (all are zero)" in text
    assert "0 of 1 checks passed" in text


@pytest.mark.parametrize("width", [80, 120])
def test_nothing_is_wider_than_the_terminal_and_no_figure_is_cut(width):
    student = FloatStudent(accuracy(CLEAN), accuracy(ROBUST))
    long = file(robust=300, name="torchscript-fp32-a-rather-long-label-of-somebody")
    text = shown(document(file(robust=488), long, absent(), float_student=student), width)
    assert all(len(line) <= width for line in text.splitlines())
    assert "…" not in text
    assert text.count("+0.0 [-0.5, +0.5]  ") == 2
    assert "-27.8 [-31.2, -24.7]  " in text
    assert "inconclusive" in text


def test_no_name_can_style_or_move_anything():
    hostile = file(name=HOSTILE, judged_on=HOSTILE, attacks=[AttackResult(HOSTILE, 0.5, {HOSTILE: 0.5}, 1.0)])
    hostile = dataclasses.replace(hostile, why=HOSTILE, command=HOSTILE)
    text = shown(document(hostile, absent(HOSTILE), data=Data(HOSTILE, HOSTILE, "0" * 64), attacks=[HOSTILE]), 500)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "[red]evil[/red]\\x1b[2J\\n\\u202efile" in text
    assert text.count("[red]") == text.count("[red]evil[/red]\\x1b[2J\\n\\u202efile")


def test_every_verdict_has_its_colour():
    colours = {"survived": "32", "lost": "31", "inconclusive": "33", "measured": "36", "not_run": "33"}
    assert set(colours) == set(EXIT)
    for name, code in colours.items():
        one = dataclasses.replace(file(), verdict=name)
        text = shown(document(one), colour=True)
        assert f"\x1b[1;{code}m{name.replace('_', ' ')}\x1b[0m" in text
        assert f"\x1b[1;{code}m{name.replace('_', ' ').upper()}\x1b[0m" in text


def test_an_epsilon_that_is_no_whole_level_is_shown_as_it_is():
    assert "Linf epsilon 0.03 " in words(document(file(), epsilon=0.03))
    assert "L2 epsilon 0.5 " in words(document(file(), norm="L2", epsilon=0.5))


def test_an_attack_on_scores_names_no_source_of_gradients():
    text = words(document(file(attacks=[AttackResult("square500", 0.7, {"scores": 0.7}, 3.0)])))
    assert "square500: 70.0 % withstand it (from its scores alone; 3.0 s)" in text
