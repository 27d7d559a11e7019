"""SIGTERM and SIGINT as a request to stop after the current step. The loop sees to it that all hosts obey at once."""

from __future__ import annotations

import logging
import os
import posix
import signal
import threading
from types import FrameType, TracebackType

log = logging.getLogger(__name__)

GRACE = 2.0  # seconds that Python has to end by itself at the second signal


class StopRequest:
    """Within `with StopRequest() as stop:` the first SIGTERM or Ctrl-C sets `stop.signal`; the second acts at once.

    Python runs handlers between two of its instructions, and one may be a compilation of minutes. So a thread, woken by
    the system through a pipe, logs at once what happens next, and ends the process where the second signal cannot.
    """

    signals = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, object] = {}
        self._left = threading.Event()

    def __enter__(self) -> StopRequest:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._thread = threading.Thread(target=self._answer, name="signals", daemon=True)
        self._thread.start()
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._note) for number in self.signals}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._left.set()
        self._restore()
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._write)  # which ends the thread
        self._thread.join()
        os.close(self._read)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _answer(self) -> None:
        if not self._next():
            return
        log.warning("stopping after this step, with a checkpoint; the same signal again (Ctrl-C) ends at once")
        if (number := self._next()) and not self._left.wait(GRACE):
            posix._exit(128 + number)  # os._exit is watched, for code of a user's that calls it

    def _next(self) -> int:
        """The number of the next of `signals`; 0 once there are no more."""
        while byte := os.read(self._read, 1):
            if byte[0] in self.signals:
                return byte[0]
        return 0
