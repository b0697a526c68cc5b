from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt
from report.documents import HOSTILE, absent, document, file, hostile

from edgekit.report import markdown, words


class Rendered(HTMLParser):
    """What another implementation of Markdown makes of the text: its tags, its cells, and the words in code spans."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.attributes, self.rows, self.spans, self.text = [], [], [], [], ""
        self.inside = set()
        self.feed(MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(source))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [key for key, _ in attrs]
        self.inside.add(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "code":
            self.spans.append("")

    def handle_endtag(self, tag):
        self.inside.discard(tag)

    def handle_data(self, data):
        self.text += data
        if self.inside & {"td", "th"}:
            self.rows[-1][-1] += data
        if "code" in self.inside:
            self.spans[-1] += data


def test_each_file_has_a_row_and_a_reason():
    verdict = document(file(), file(robust=300, name="b|c"), absent())
    page = Rendered(markdown.to_markdown(verdict))
    assert [[cell.strip() for cell in row] for row in page.rows][2:4] == [
        ["onnx-int8", "912", "94.6 % [92.7, 96.0]", "69.5 % [66.1, 72.8]", "+0.0 [-0.5, +0.5]", "✅ survived"],
        ["b|c", "912", "94.6 % [92.7, 96.0]", "41.7 % [38.2, 45.4]", "-27.8 [-31.2, -24.7]", "❌ lost"],
    ]
    for one in verdict.artifacts:
        assert one.why in page.text
    assert words.closing(verdict, "below") in page.text
    assert markdown.to_markdown(verdict).startswith("**❌ lost**: b")


@pytest.mark.parametrize("kind", HOSTILE)
def test_no_name_is_markup_a_link_or_a_mention(kind, tmp_path):
    markdown.write(hostile(HOSTILE[kind]), tmp_path / "comment.md")
    source = (tmp_path / "comment.md").read_text(encoding="utf-8")
    page = Rendered(source)
    ours = {"p", "strong", "table", "thead", "tbody", "tr", "th", "td", "ul", "li", "code", "sub"}
    assert set(page.tags) <= ours
    assert set(page.attributes) <= {"style"}  # the alignment of a column
    assert [len(row) for row in page.rows] == [6] * 4
    shown = words.name(HOSTILE[kind])
    if shown.strip():
        assert [span.strip() for span in page.spans][:2] == [shown.strip()] * 2
        assert page.text.count(words.plain(HOSTILE[kind]).strip()) >= 2  # as the reason, whole and literal
    outside_code = strip_spans(source)
    for linked in ("://", "www.", "@everyone", "#1", "GH-1"):
        assert linked not in outside_code


def strip_spans(source):
    """The source without its code spans, which GitHub leaves alone."""
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(source)
    kept = []
    for token in tokens:
        for child in token.children or []:
            if child.type != "code_inline":
                kept.append(child.content)
            if child.type == "html_inline":
                kept.append("<!-- -->")
    return "\0".join(kept)
