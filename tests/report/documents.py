"""Verdicts to print, and names that would do harm if a report obeyed them."""

import dataclasses

import numpy as np

from edgekit.report.evidence import Curves, Evidence, gather
from edgekit.verdict import (
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
HOSTILE = {
    "markup": "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&amp;",
    "closing": "</td></table></style>--><!--]]>",
    "template": "{{ 7 * 7 }}{% raw %}",
    "ansi": "\x1b[31mred\x1b[0m\x1b[2J\x9b1m",
    "lines": "a\r\nb\n\n# heading\n- item\tb\x85c\u2028d",
    "pipes": "a|b\\|c\\\\|d|",
    "ticks": "```x``y`",
    "link": "[click](javascript:alert) ![pixel](http://evil.invalid/x.png) http://evil.invalid www.evil.invalid",
    "mention": "@everyone #1 GH-1 <b@evil.invalid>",
    "formula": "=HYPERLINK(\"http://evil.invalid\";\"x\")",
    "formulas": "+1-1|cmd",
    "xml": "\x00\x01\x0b\ufffe\uffff\ud800\udfff]]>",
    "direction": "\u202egnp.exe\u2066\u061c\u200b",
    "long": "long-" * 4000,
    "blank": " ",
}  # fmt: skip


def file(robust=500, name="onnx-int8", rules=None, student=True, **more):
    beside = {"float_clean_right": CLEAN, "float_robust_right": ROBUST, "agreement": 0.985} if student else {}
    share = {more: (robust + more) / 719 for more in (20, 30, 40, 60)}
    given = {
        "format": "onnx",
        "precision": "int8",
        "file": "artifacts/onnx-int8/model.onnx",
        "bytes": 912_345,
        "sha256": "0" * 64,
        "attacks": [
            AttackResult("pgd20", share[20], {"float": share[40], "twin": share[30]}, 9.5),
            AttackResult("square500", share[60], {"scores": share[60]}, 2.5),
        ],
        "judged_on": "x86 avx512_vnni, onnxruntime 1.32.0",
        "twin": Twin(1.0, 0.0),
        "checks": [Check("twin_fidelity", True, 1.0, "the twin decides as the file does on 100.00 % of all images")],
    }
    return judged(rules or Rules(), CLEAN, np.arange(719) < robust, name=name, **(given | beside | more))


def absent(name="tensorrt-int8"):
    same = {"format": "tensorrt", "precision": "int8", "file": "a", "bytes": 5_000_000, "sha256": "0" * 64}
    return not_run(name=name, why="there is no GPU here", command="edgekit verify a", **same)


def document(*files, rules=None, **more):
    given = {
        "attacks": ["pgd20", "square500"],
        "norm": "Linf",
        "epsilon": 8 / 255,
        "samples": 719,
        "seed": 0,
        "data": Data("digits", "test", "1" * 64),
        "machine": Machine("a cpu", "avx512_vnni", {"onnxruntime": "1.32.0"}),
        "float_student": FloatStudent(accuracy(CLEAN), accuracy(ROBUST)),
    }
    return summarize(rules or Rules(), files, **(given | more))


def hostile(name):
    """A verdict in which every text from outside is `name`."""
    one = file(
        name=name,
        file=name,
        judged_on=name,
        attacks=[AttackResult(name, 0.5, {name: 0.5, "twin": 0.6}, 1.0)],
        checks=[Check(name, False, 0.0, name)],
    )
    one = dataclasses.replace(one, why=name, command=name, format=name, precision=name, sha256=name)
    other = dataclasses.replace(absent(name), why=name, command=name)
    outside = {"data": Data(name, name, name), "machine": Machine(name, name, {name: name}), "attacks": [name]}
    return document(one, other, **outside)


def images(count=719, channels=3, size=16):
    """Smooth pictures, a different one for each sample: (N, C, H, W) float32 in [0, 1]."""
    x, y = np.meshgrid(np.linspace(0, 3, size), np.linspace(0, 3, size))
    phase = np.arange(count * channels).reshape(count, channels, 1, 1)
    return (0.5 + 0.4 * np.sin(x + phase) * np.cos(y + 0.7 * phase)).astype(np.float32)


def seen(name="onnx-int8", robust=480, classes=10, student=True, **more):
    """The evidence that belongs to `file(robust, name)`: sample i is robust on the file where i < robust."""
    clean, places = images(), np.arange(719)
    change = np.sign(np.sin(places.reshape(-1, 1, 1, 1) + 7 * clean * 30)) * 8 / 255
    stands = places < robust
    labels = places * 7 % classes
    fooled = np.where(places % 3, "twin", "float")
    beside = {"float_clean": CLEAN, "float_robust": ROBUST, "float_says": labels} if student else {}
    given = {
        "images": clean,
        "labels": labels,
        "index": places + 1000,
        "file_clean": CLEAN,
        "file_robust": stands,
        "adversarial": np.clip(clean + change * ~stands.reshape(-1, 1, 1, 1), 0, 1).astype(np.float32),
        "file_says": np.where(stands, labels, (labels + 1) % classes),
        "attacks": np.where(stands, "", np.where(CLEAN, "pgd20", "clean")).tolist(),
        "sources": np.where(stands | ~CLEAN, "", fooled).tolist(),
    }
    return gather(name, **(given | beside | more))


def falling(top, epsilon=8 / 255):
    """Curves as an attack that works leaves them."""
    radii = [0, 2 / 255, 4 / 255, epsilon, 16 / 255, 32 / 255]
    shares = (0.95, (0.95 + top) / 2 + 0.04, top + 0.1, top, top / 3, 0.02)
    steps = {1: top + 0.12, 5: top + 0.04, 10: top + 0.015, 20: top, 50: top - 0.002}
    return Curves(dict(zip(radii, shares, strict=True)), steps)


def evidence(
    *files, classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
):
    return Evidence(files, tuple(classes), falling(0.69), {"torch": "2.14.1"}, {"student": "sha256 " + "2" * 64})
