from xml.etree import ElementTree

import pytest
from report.documents import HOSTILE, absent, document, file, hostile

from edgekit.report import junit, words


def test_each_file_is_a_test_with_the_result_that_its_verdict_is():
    files = [file(), file(robust=300, name="b"), file(robust=488, name="c"), absent("d")]
    root = ElementTree.fromstring(junit.to_xml(document(*files)).encode())
    (suite,) = root.findall("testsuite")
    results = {case.get("name"): [child.tag for child in case] for case in suite.findall("testcase")}
    assert results == {
        "onnx-int8": ["system-out"],
        "b": ["failure", "system-out"],
        "c": ["error", "system-out"],
        "d": ["skipped", "system-out"],
    }
    for element in (root, suite):
        counted = {key: element.get(key) for key in ("tests", "failures", "errors", "skipped", "time")}
        assert counted == {"tests": "4", "failures": "1", "errors": "1", "skipped": "1", "time": "36.000"}
    failure = suite.find("testcase/failure")
    assert failure is not None
    assert failure.get("type") == "lost"
    assert "all of the interval is beyond the 2 points allowed" in (failure.get("message") or "")


@pytest.mark.parametrize("kind", HOSTILE)
def test_no_name_breaks_the_document(kind, tmp_path):
    junit.write(hostile(HOSTILE[kind]), tmp_path / "junit.xml")
    root = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert [element.tag for element in root.iter("testcase")] == ["testcase"] * 2
    assert {element.get("name") for element in root.iter("testcase")} == {words.name(HOSTILE[kind])}
    known = {"testsuites", "testsuite", "properties", "property", "testcase", "error", "skipped", "system-out"}
    assert {element.tag for element in root.iter()} == known
    assert [path.name for path in tmp_path.iterdir()] == ["junit.xml"]
