"""A Verdict as JUnit XML, which every CI shows: one test for each file."""

from pathlib import Path
from xml.etree import ElementTree

from edgekit.files import write_text
from edgekit.report import words
from edgekit.verdict import ArtifactVerdict, Verdict

# What a verdict is in JUnit's words; what is not here has passed.
RESULT = {"lost": "failure", "inconclusive": "error", "not_run": "skipped"}


def write(verdict: Verdict, path: Path) -> None:
    """Write the document whole or not at all."""
    write_text(path, to_xml(verdict))


def to_xml(verdict: Verdict) -> str:
    """The document, well-formed whatever the names in it hold."""
    results = [RESULT.get(one.verdict) for one in verdict.artifacts]
    about = {
        "name": "edgekit verify",
        "tests": f"{len(results)}",
        "failures": f"{results.count('failure')}",
        "errors": f"{results.count('error')}",
        "skipped": f"{results.count('skipped')}",
        "time": f"{sum(map(_seconds, verdict.artifacts)):.3f}",
    }
    root = ElementTree.Element("testsuites", about)
    suite = ElementTree.SubElement(root, "testsuite", about)
    properties = ElementTree.SubElement(suite, "properties")
    given = {"what": words.heading(verdict), "verdict": verdict.verdict, "edgekit": verdict.edgekit}
    for key, value in (given | {"data sha256": verdict.data.sha256, "cpu": verdict.machine.cpu}).items():
        ElementTree.SubElement(properties, "property", {"name": key, "value": words.plain(value)})
    for one in verdict.artifacts:
        _testcase(suite, one)
    ElementTree.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ElementTree.tostring(root, encoding="unicode")}\n'


def _testcase(suite: ElementTree.Element, one: ArtifactVerdict) -> None:
    about = {"classname": "edgekit.verify", "name": words.name(one.name), "time": f"{_seconds(one):.3f}"}
    case = ElementTree.SubElement(suite, "testcase", about)
    why = words.plain(f"{words.word(one.verdict)}: {one.why}")
    if kind := RESULT.get(one.verdict):
        result = ElementTree.SubElement(case, kind, {"message": why, "type": one.verdict})
        result.text = why
    lines = [why, *words.facts(one), f"{one.file}, {one.bytes:,} bytes, sha256 {one.sha256}"]
    ElementTree.SubElement(case, "system-out").text = "\n".join(words.plain(line) for line in lines)


def _seconds(one: ArtifactVerdict) -> float:
    return sum(attack.seconds for attack in one.attacks)
