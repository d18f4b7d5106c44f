"""Charts: every point is inside its axes, and the axes hold every value."""

import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pointsman.bench.plot import HEIGHT, LEFT, MOST_TICKS, RIGHT, WIDTH, Bars, Line, Panel, chart, ticks

SVG = "{http://www.w3.org/2000/svg}"


@given(st.floats(1e-6, 1e9))
def test_ticks_are_few_and_reach_beyond_the_most(most):
    found = ticks(most)
    assert found[0] == 0
    assert found[-1] >= most * (1 - 1e-9)
    assert len(found) <= MOST_TICKS + 2


POINTS = st.lists(st.tuples(st.floats(0.5, 1e6), st.floats(0, 1e6)), min_size=1, max_size=8)


@given(st.lists(POINTS, min_size=1, max_size=3), st.booleans())
def test_every_point_is_inside(lines, logarithmic):
    made = [Line(name=f"<{index}>", points=points, labels=["a & b"]) for index, points in enumerate(lines)]
    panel = Panel(title="t", x="x", y="y", lines=made, limit=("most", 10.0), logarithmic=logarithmic)
    root = ElementTree.fromstring(chart([panel, panel]))
    circles = root.findall(f".//{SVG}circle")
    assert len(circles) == 2 * sum(map(len, lines))
    for circle in circles:
        assert LEFT - 1 <= float(circle.get("cx")) <= WIDTH
        assert 0 <= float(circle.get("cy")) <= HEIGHT
    assert sum(text.text == "<0>" for text in root.iter(f"{SVG}text")) == 1


def test_nothing_cannot_be_drawn():
    with pytest.raises(ValueError, match="there is nothing to draw in 'empty'"):
        chart([Panel(title="empty", x="x", y="y", lines=[])])
    with pytest.raises(ValueError, match="there is nothing to draw in 'empty'"):
        chart([Bars(title="empty", x="x", rows=[("a", {})])])


PARTS = st.dictionaries(st.sampled_from("abcdef"), st.floats(0, 1e6), min_size=1)


@given(st.lists(PARTS, min_size=1, max_size=9), st.floats(1, 1e7))
@example([{"a": 397924.0, "b": 1000000.0, "c": 277807.0, "d": 0.0}], 1.0)  # places rounded to tenths were a tenth apart
def test_bars_are_as_long_as_their_parts_and_stand_in_a_row(rows, limit):
    drawn = Bars(title="t", x="x", rows=[(f"row {index}", parts) for index, parts in enumerate(rows)], limit=("all", limit))
    root = ElementTree.fromstring(chart([drawn]))
    most = ticks(max(*(sum(parts.values()) for parts in rows), limit))[-1]
    rects = iter(root.find(f"{SVG}g").findall(f"{SVG}rect"))
    for parts in rows:
        first = LEFT
        for length in parts.values():
            rect = next(rects)
            assert float(rect.get("x")) == pytest.approx(first, abs=0.1)
            assert float(rect.get("width")) == pytest.approx(length / most * (WIDTH - LEFT - RIGHT), abs=0.01)
            assert 0 <= float(rect.get("y")) <= HEIGHT
            first = float(rect.get("x")) + float(rect.get("width"))
        assert first <= WIDTH - RIGHT + 1
    assert next(rects, None) is None
