"""The page as text: what it says, what it asks of the network (nothing), and names that would do harm."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hatchling.builders.wheel import WheelBuilder
from report.documents import HOSTILE, absent, document, evidence, falling, file, hostile, seen
from test_layout import ROOT

from edgekit.report import page, words
from edgekit.report.checks import EXPLAINED
from edgekit.report.evidence import Evidence
from edgekit.verdict import Check, Rules

# Elements that HTML never closes.
VOID = {"meta", "img"}
CHECKS = [Check(name, True, 1.0, "as it should") for name in EXPLAINED]


class Read(HTMLParser):
    """The tags with their attributes, the words outside of style, and the words of each section."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.open, self.sections, self.section = [], "", [], {}, ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "section":
            self.section = dict(attrs)["id"]
        if tag in ("td", "th", "small"):  # what a reader sees apart
            self.handle_data(" ")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
            self.sections[self.section] = self.sections.get(self.section, "") + data


def whole():
    verdict = document(file(robust=460, checks=CHECKS), file(robust=499, name="torchscript-fp32"), absent())
    return verdict, evidence(
        seen(robust=460, curves=falling(0.64)), seen("torchscript-fp32", 499, curves=falling(0.68))
    )


def read(verdict, evidence=None, command=""):
    return Read(page.to_html(verdict, evidence, command))


def blanks(text):
    return " ".join(text.split())


def test_the_page_says_what_the_verdict_says():
    verdict, known = whole()
    shown = read(verdict, known, "edgekit verify --attack pgd20,square500")
    assert shown.open == []
    assert shown.text.count(words.closing(verdict, "below")) == 1
    for one in verdict.artifacts:
        assert one.why in shown.text
        assert one.sha256 in shown.sections["run"]
    files, attacks = blanks(shown.sections["files"]), blanks(shown.sections["attacks"])
    assert "onnx-int8 onnx int8 912 kB 94.6 % [92.7, 96.0] 64.0 % [60.4, 67.4] -5.6 [-7.5, -4.1] lost" in files
    assert "pgd20 worst of its sources, 19.0 s 66.8 % [63.2, 70.1] 72.2 % [68.8, 75.3] –" in attacks
    assert "from twin 68.2 % [64.7, 71.5]" in attacks
    assert "square500 from scores alone, 5.0 s 72.3 % [68.9, 75.5]" in attacks
    assert "under attack 460 40 0 219" in blanks(shown.sections["disagreement"])
    assert "airplane 72 63.9 % 94.4 % clean" in blanks(shown.sections["classes"])
    assert "12 of 40" in shown.sections["images"]
    assert "change × 15.9" in shown.sections["images"]  # 0.5 / (8 / 255)
    ran = blanks(shown.sections["run"])
    for said in ("edgekit verify --attack pgd20,square500", "seed 0", "1" * 64, "2" * 64, "torch 2.14.1", "8/255"):
        assert said in ran


def test_intervals_of_single_attacks_are_those_of_their_counts():
    # Wilson's ends are where the normal test of a share p just fails: (share - p)^2 = z^2 p (1 - p) / n.
    share, n, z = 480 / 719, 719, 1.959964  # 460 + 20, as `file` says
    low, high = sorted(np.roots([1 + z * z / n, -2 * share - z * z / n, share * share]))
    assert f"66.8 % [{100 * low:.1f}, {100 * high:.1f}]" in blanks(read(*whole()).sections["attacks"])


def test_every_check_is_explained_and_a_failed_one_cured():
    assert len(EXPLAINED) == 12
    shown = read(document(file(checks=CHECKS)))
    for name, explained in EXPLAINED.items():
        assert name in shown.sections["checks"]
        assert explained.tests in shown.sections["checks"]
        assert explained.cure not in shown.sections["checks"]
        failed = [Check("same_answer_twice", True, 1.0, "alike"), Check(name, False, 0.1, "because of that")]
        section = read(document(file(checks=failed))).sections["checks"]
        assert explained.means in section
        assert explained.cure in section
        assert section.index("because of that") < section.rindex("alike") or name == "same_answer_twice"


def test_a_check_of_a_later_edgekit_is_shown_without_an_explanation():
    section = read(document(file(checks=[Check("yet_unknown", False, 0.0, "it says so")]))).sections["checks"]
    assert "yet_unknown" in section
    assert "it says so" in section


def test_without_evidence_or_a_student_their_sections_are_absent():
    rules = Rules(at_least=0.6)
    shown = read(document(file(rules=rules, student=False), rules=rules, float_student=None))
    assert set(shown.sections) == {"", "files", "attacks", "checks", "run", "reading"}
    assert "float student" not in shown.text
    links = {attributes["href"] for tag, attributes in shown.tags if tag == "a"}
    assert links == {f"#{section}" for section in shown.sections if section}
    alone = read(document(file(student=False), float_student=None), Evidence((seen(student=False),)))
    assert "disagreement" not in alone.sections
    assert "12 of 200" in alone.sections["images"]
    assert "class 3" in alone.sections["classes"]


def test_an_l2_ball_enlarges_by_the_change_of_the_image():
    verdict = document(file(robust=460), norm="L2", epsilon=0.5)
    assert re.search(r"change × 15\.9", read(verdict, evidence(seen(robust=460))).sections["images"])


def test_of_many_classes_those_that_lost_most_are_shown():
    many = evidence(seen(robust=460, classes=300), classes=[f"name{label}." for label in range(300)])
    section = read(document(file(robust=460)), many).sections["classes"]
    assert "The 40 classes that lost most; 260 others are not shown" in section
    assert len(re.findall(r"name\d+\.", section)) == 40
    lost = {label for label in range(300) for place in range(460, 500) if place * 7 % 300 == label}
    assert {int(label) for label in re.findall(r"name(\d+)\.", section)} <= lost


def test_the_page_asks_nothing_of_anybody():
    html = page.to_html(*whole())
    shown = Read(html)
    policy = [attributes["content"] for tag, attributes in shown.tags if attributes.get("http-equiv")]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    loading = {"script", "link", "iframe", "object", "embed", "form", "base", "audio", "video", "source"}
    assert not loading & {tag for tag, _ in shown.tags}
    for tag, attributes in shown.tags:
        assert not any(key.startswith("on") or key in ("srcset", "xlink:href", "action") for key in attributes)
        assert attributes.get("href", "#").startswith("#")
        assert attributes.get("src", "data:image/png;base64,").startswith("data:image/png;base64,"), tag
    assert not re.search(r"https?:|//[a-z]|url\(|@import", re.sub(r"data:image/png;base64,[\w+/=]+", "", html))
    assert sum(tag == "img" for tag, _ in shown.tags) == 3 * (12 + 1)


def everywhere(name):
    """The page on which every text from outside is `name`: files, classes, attacks, versions, facts, the command."""
    known = evidence(
        seen(name, 460, attacks=[name] * 719, sources=[name] * 719, curves=falling(0.6)), classes=[name] * 10
    )
    known = Evidence(known.files, known.classes, known.float_curves, {name: name}, {name: name})
    return page.to_html(hostile(name), known, command=name)


@pytest.mark.parametrize("kind", HOSTILE)
def test_no_name_changes_the_page(kind):
    name = HOSTILE[kind]
    html = everywhere(name)
    html.encode("utf-8")
    shown, harmless = Read(html), Read(everywhere("harmless"))
    assert shown.open == []
    # The same elements with the same attributes in the same order: nothing that the name holds was read as markup.
    assert [(tag, *attributes) for tag, attributes in shown.tags] == [(tag, *given) for tag, given in harmless.tags]
    said = words.name(name)
    assert said in shown.text
    assert words.plain(name) in shown.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufffe\uffff]", html)


def test_a_name_cannot_start_a_formula_where_a_table_is_copied():
    shown = read(hostile("=1+1"), evidence(seen("=1+1"), classes=["@SUM(1)"] * 10))
    cells = re.findall(r"<(?:td|th)[^>]*>(.*?)</t[dh]>", page.to_html(hostile("=1+1"), evidence(seen("=1+1"))), re.S)
    texts = [re.sub("<[^>]+>", "", cell).strip() for cell in cells]
    assert "'=1+1" in shown.text
    assert not [text for text in texts if re.match("[=@]|[+-](?![0-9]+[.])", text)]


def test_the_page_is_written_whole(tmp_path):
    page.write(*whole(), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page.to_html(*whole())
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_the_wheel_carries_the_template():
    carried = {str(entry.distribution_path) for entry in WheelBuilder(str(ROOT.parent)).recurse_included_files()}
    assert {"edgekit/report/page.html", "edgekit/report/page.css"} <= carried


def test_letters_can_be_told_from_their_ground():
    """WCAG 2.2, success criterion 1.4.3: a contrast of 4.5 in light and in dark."""
    css = (ROOT / "report" / "page.css").read_text()
    for block in re.findall(r":root \{(.*?)\}", css, re.S):
        colours = dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]+)", block))
        for colour in list(colours):
            if len(colours[colour]) == 4:
                colours[colour] = "#" + "".join(2 * digit for digit in colours[colour][1:])
        pairs = [(ink, ground) for ink in ("ink", "soft") for ground in ("ground", "sheet", "wash")]
        pairs += [(tone, ground) for tone in ("green", "red") for ground in ("sheet",)]
        pairs += [(tone, f"{tone}-wash") for tone in ("green", "red", "amber", "blue")]
        pairs += [("ink", f"{tone}-wash") for tone in ("green", "red", "amber", "blue")] + [("blue", "ground")]
        for first, second in pairs:
            lights = sorted(luminance(colours[name]) for name in (first, second))
            assert (lights[1] + 0.05) / (lights[0] + 0.05) >= 4.5, (first, second, block[:40])
        for series in range(6):  # graphics need 3: criterion 1.4.11
            lights = sorted((luminance(colours[f"s{series}"]), luminance(colours["sheet"])))
            assert (lights[1] + 0.05) / (lights[0] + 0.05) >= 3, series


def luminance(colour):
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
