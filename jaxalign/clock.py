"""Seconds of work without those of compilation, which the first call of each shape has and no later one."""

from __future__ import annotations

import threading
import time
from typing import Any

from jax import monitoring

COMPILATION = "/jax/core/compile/"  # events of tracing, lowering and compiling; one may lie within another


def elapsed(began: float) -> float:
    """Seconds since `time.perf_counter()` was `began`, without those in which a thread compiled for JAX."""
    now = time.perf_counter()
    return now - began - _compilations.overlap(began, now)


class Spans:
    """Disjoint spans of time, in order."""

    def __init__(self) -> None:
        self._spans: list[tuple[float, float]] = []
        self._lock = threading.Lock()

    def add(self, start: float, end: float) -> None:
        """Joins a span, which ends after all others do, with those that it overlaps."""
        with self._lock:
            while self._spans and self._spans[-1][1] >= start:
                start = min(start, self._spans.pop()[0])
            self._spans.append((start, end))

    def overlap(self, start: float, end: float) -> float:
        """Seconds of the spans between two times."""
        with self._lock:
            return sum(max(0.0, min(end, b) - max(start, a)) for a, b in self._spans)


_compilations = Spans()


def _note(event: str, seconds: float, **_: Any) -> None:
    if event.startswith(COMPILATION):
        now = time.perf_counter()
        _compilations.add(now - seconds, now)


monitoring.register_event_duration_secs_listener(_note)
