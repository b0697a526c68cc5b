import itertools
from xml.etree import ElementTree

import pytest

from edgekit.report import svg

NAMESPACE_FREE = {"svg", "line", "circle", "text", "rect", "polyline"}


def parsed(markup):
    root = ElementTree.fromstring(str(markup))
    assert {element.tag for element in root.iter()} <= NAMESPACE_FREE
    return root


def test_a_line_passes_where_its_figures_say():
    values = {0.0: 1.0, 1.0: 0.25, 4.0: 0.0}
    root = parsed(svg.lines([("series-0", values)], label="x", ticks={0: "0", 4: "4"}, mark=1.0, title="t"))
    (line,) = root.iter("polyline")
    corners = [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]
    grid = sorted(float(row.get("y1")) for row in root.iter("line") if row.get("class") in ("grid", "axis"))
    top, bottom = grid[0], grid[-1]
    assert [pytest.approx((bottom - y) / (bottom - top), abs=1e-2) for _, y in corners] == [1, 0.25, 0]
    assert (corners[1][0] - corners[0][0]) / (corners[2][0] - corners[0][0]) == pytest.approx(0.25, abs=1e-2)
    (mark,) = (row for row in root.iter("line") if row.get("class") == "mark")
    assert float(mark.get("x1")) == corners[1][0]


def test_labels_that_would_touch_are_left_out():
    ticks = {x / 255: f"{x}/255" for x in range(33)}
    root = parsed(svg.lines([("s", {0: 1.0, 32 / 255: 0.0})], label="x", ticks=ticks, title="t"))
    labels = [float(text.get("x")) for text in root.iter("text") if (text.text or "").endswith("/255")]
    assert 4 <= len(labels) <= 10
    assert min(b - a for a, b in itertools.pairwise(labels)) >= 40


def test_one_point_alone_is_drawn():
    assert len(list(parsed(svg.lines([("s", {8: 0.5})], label="x", ticks={8: "8"}, title="t")).iter("circle"))) == 1


def test_the_parts_of_a_bar_fill_it():
    root = parsed(svg.stacked([("both", 3), ("only-float", 0), ("neither", 1)], "t"))
    parts = [(part.get("class"), float(part.get("x")), float(part.get("width"))) for part in root.iter("rect")]
    assert parts == [("both", 0, 300), ("neither", 300, 100)]


def test_an_interval_lies_in_the_shade_where_it_is_beyond_what_is_allowed():
    root = parsed(svg.interval(-0.05, -0.07, -0.03, 0.02, (-0.08, 0.01), "t"))
    (shade,) = root.iter("rect")
    (dot,) = root.iter("circle")
    whisker = next(line for line in root.iter("line") if line.get("class") == "whisker")
    edge = float(shade.get("x")) + float(shade.get("width"))
    assert float(whisker.get("x1")) < float(dot.get("cx")) < float(whisker.get("x2")) < edge
    (limit,) = (line for line in root.iter("line") if line.get("class") == "limit")
    assert float(limit.get("x1")) == edge


def test_no_title_leaves_its_attribute():
    root = parsed(svg.pairs([("s", 0.5, 0.4), ("s", None, 1.0)], '"><script>\x00'))
    assert root.get("aria-label") == '"><script>\\x00'
    assert len(list(root.iter("circle"))) == 3
