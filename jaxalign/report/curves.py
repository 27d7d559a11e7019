"""Curves of a metric over the steps of a run, as SVG text to put into an HTML page."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

WIDTH, HEIGHT = 420, 200  # of a picture, in units of its view box
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 26, 34  # margins, for numbers and words
SMOOTHING = 5  # steps averaged into a point of the bold line


def curve(title: str, values: Sequence[float | None], *, unit: str = "") -> str:
    """SVG of the values at steps 1, 2, ... as a pale line, and of their running mean (`smooth`) as a bold one.

    Args:
      title: plain text above the picture.
      values: one per step; None, NaN and infinities draw no point.
      unit: plain text at the top right.
    """
    points = [(step, v) for step, v in enumerate(values, 1) if v is not None and math.isfinite(v)]
    heading = f"<text x={LEFT} y=16 class=t>{html.escape(title)}</text>"
    if not points:
        return _svg(title, heading + f"<text x={LEFT} y={HEIGHT // 2}>no steps</text>")
    marks = ticks(min(v for _, v in points), max(v for _, v in points))
    steps = [step for step in ticks(0, len(values)) if 0 < step <= len(values) and step == int(step)]

    def across(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (step - 1) / max(len(values) - 1, 1)

    def down(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (marks[-1] - value) / (marks[-1] - marks[0])

    def polyline(name: str, points: Sequence[tuple[int, float]]) -> str:
        places = " ".join(f"{across(step):.1f},{down(v):.1f}" for step, v in points)
        return f"<polyline class={name} points='{places}' />"

    grid = "".join(
        f"<line x1={LEFT} x2={WIDTH - RIGHT} y1={down(m):.1f} y2={down(m):.1f} class=g />"
        f"<text x={LEFT - 6} y={down(m) + 4:.1f} text-anchor=end>{m:g}</text>"
        for m in marks
    )
    below = "".join(
        f"<text x={across(step):.1f} y={HEIGHT - BOTTOM + 15} text-anchor=middle>{step:g}</text>" for step in steps
    )
    words = f"<text x={WIDTH - RIGHT} y={HEIGHT - 4} text-anchor=end>step</text>"
    words += f"<text x={WIDTH - RIGHT} y=16 text-anchor=end>{html.escape(unit)}</text>"
    lines = polyline("raw", points) + polyline("mean", smooth(points))
    return _svg(title, heading + grid + below + words + lines)


def smooth(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Running mean: each value averaged with those before it, SMOOTHING in all."""
    means = []
    for i, (step, _) in enumerate(points):
        last = [v for _, v in points[max(0, i + 1 - SMOOTHING) : i + 1]]
        means.append((step, sum(last) / len(last)))
    return means


def ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Marks of an axis that spans [low, high] or more: up to `most` multiples of 1, 2 or 5 times a power of ten."""
    if high <= low:
        low, high = low - 0.5, high + 0.5
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    for factor in (1, 2, 5, 10, 20):
        first, last = math.floor(low / (factor * power)), math.ceil(high / (factor * power))
        if last - first < most:
            return [round(k * factor * power, 12) for k in range(first, last + 1)]
    raise AssertionError


def _svg(title: str, inner: str) -> str:
    return f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role=img aria-label='{html.escape(title)}'>{inner}</svg>"
