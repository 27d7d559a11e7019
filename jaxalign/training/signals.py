"""SIGTERM and SIGINT as a request to stop after the current step, at the same step on every host."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

import jax

from jaxalign import hosts


class StopRequest:
    """Within `with StopRequest() as stop:` the first SIGTERM or Ctrl-C sets `stop.signal`; the second acts at once."""

    signals = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in self.signals}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self, step: int, *, every: int = 10) -> bool:
        """Returns whether to stop after `step`. Several hosts compare signals every `every` steps, to stop together."""
        if jax.process_count() == 1:
            return self.signal is not None
        if step % every:
            return False
        self.signal = hosts.largest(self.signal or 0) or None
        return self.signal is not None
