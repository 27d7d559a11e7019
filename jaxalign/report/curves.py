"""What a run measured over its steps, drawn as SVG that stands in the page itself."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

WIDTH, HEIGHT = 420, 200  # of a picture, in its own pixels
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 26, 34  # margins, where numbers and words stand
SMOOTHING = 5  # steps that the bold line is the mean of


def curve(title: str, values: Sequence[float | None], *, unit: str = "") -> str:
    """Values of steps 1, 2, ... as a pale line, and the mean of the last few as a bold one.

    Args:
      title: above the picture, as text.
      values: None and what is not finite leave no point.
      unit: at the upper axis, as text.
    """
    points = [(step, v) for step, v in enumerate(values, 1) if v is not None and math.isfinite(v)]
    said = f"<text x={LEFT} y=16 class=t>{html.escape(title)}</text>"
    if not points:
        return _svg(title, said + f"<text x={LEFT} y={HEIGHT // 2}>no steps</text>")
    marks = ticks(min(v for _, v in points), max(v for _, v in points))
    steps = [step for step in ticks(0, len(values)) if 0 < step <= len(values) and step == int(step)]
    across = lambda step: LEFT + (WIDTH - LEFT - RIGHT) * (step - 1) / max(len(values) - 1, 1)  # noqa: E731
    down = lambda v: TOP + (HEIGHT - TOP - BOTTOM) * (marks[-1] - v) / (marks[-1] - marks[0])  # noqa: E731
    place = lambda found: " ".join(f"{across(step):.1f},{down(v):.1f}" for step, v in found)  # noqa: E731
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
    lines = f"<polyline class=raw points='{place(points)}' /><polyline class=mean points='{place(smooth(points))}' />"
    return _svg(title, said + grid + below + words + lines)


def smooth(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Each value is the mean of itself and of those before it, SMOOTHING in all."""
    found = []
    for i, (step, _) in enumerate(points):
        last = [v for _, v in points[max(0, i + 1 - SMOOTHING) : i + 1]]
        found.append((step, sum(last) / len(last)))
    return found


def ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Up to `most` multiples of 1, 2 or 5 times a power of ten, the first at most `low`, the last at least `high`."""
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
