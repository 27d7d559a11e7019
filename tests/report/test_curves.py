"""Curves of a run as SVG: the places of points, the texts beside them, and their escaping."""

import math
import re
from xml.etree import ElementTree

import pytest

from jaxalign.report.curves import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, curve, smooth, ticks


def drawn(svg: str) -> dict[str, list[tuple[float, float]]]:
    """Points of each line, by its class."""
    lines = re.findall(r"<polyline class=(\w+) points='([^']*)'", svg)
    return {name: [tuple(map(float, p.split(","))) for p in points.split()] for name, points in lines}


def words(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def test_the_first_and_last_step_stand_at_the_edges_and_the_extremes_at_their_marks():
    svg = curve("score", [0.0, 2.0, 1.0])
    assert drawn(svg)["raw"] == [
        (LEFT, HEIGHT - BOTTOM),  # 0 is the lowest mark
        (LEFT + (WIDTH - LEFT - RIGHT) / 2, TOP),  # 2 the highest
        (WIDTH - RIGHT, TOP + (HEIGHT - TOP - BOTTOM) / 2),
    ]
    assert drawn(svg)["mean"][-1] == drawn(svg)["raw"][-1]  # the mean of 0, 2 and 1 is 1


def test_axes_say_what_they_are_of():
    texts = words(curve("KL", [0.1 * step for step in range(25)], unit="nats"))
    assert {"KL", "nats", "step"} <= set(texts)
    assert {"5", "10", "15", "20", "25"} <= set(texts) and {"0.5", "2.5"} <= set(texts)


@pytest.mark.parametrize(
    ("low", "high", "marks"),
    [
        (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (-0.3, 2.2, [-0.5, 0, 0.5, 1.0, 1.5, 2.0, 2.5]),
        (3.0, 3.0, [2.4, 2.6, 2.8, 3.0, 3.2, 3.4, 3.6]),
        (0.0, 25.0, [0, 5, 10, 15, 20, 25]),
        (0.0, 0.0004, [0, 0.0001, 0.0002, 0.0003, 0.0004]),
    ],
)
def test_marks_are_few_round_numbers_around_what_is_drawn(low, high, marks):
    assert ticks(low, high) == pytest.approx(marks)


def test_the_bold_line_is_the_mean_of_the_last_five():
    values = [(step, float(step)) for step in range(1, 8)]
    assert [v for _, v in smooth(values)] == [1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0]


def test_steps_without_a_finite_value_leave_no_point():
    svg = curve("score", [1.0, None, math.nan, math.inf, 2.0])
    assert [x for x, _ in drawn(svg)["raw"]] == [LEFT, WIDTH - RIGHT]


@pytest.mark.parametrize("values", [[], [None, math.nan]])
def test_a_run_without_steps_says_so(values):
    svg = curve("score", values)
    assert "no steps" in words(svg) and not drawn(svg)


def test_one_step_or_a_level_run_is_drawn():
    assert len(drawn(curve("score", [0.5]))["raw"]) == 1
    level = drawn(curve("score", [0.5] * 4))["raw"]
    assert {y for _, y in level} == {TOP + (HEIGHT - TOP - BOTTOM) / 2}


def test_words_never_become_tags():
    hostile = "<script>alert('x')</script> & \"y\""
    svg = curve(hostile, [1.0, 2.0], unit=hostile)
    assert "<script" not in svg
    quoted = re.sub(r"=([\w.-]+)(?=[ >/])", r"='\1'", svg)  # as XML wants it
    root = ElementTree.fromstring(quoted)
    assert root.attrib["aria-label"] == hostile
    assert [text.text for text in root.iter("text")].count(hostile) == 2
