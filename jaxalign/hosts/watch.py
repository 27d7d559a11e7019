"""The watch that each host keeps on the others, from the meeting to the end of the process.

Host 0 has a link to every other host and passes on what one sends. A thread sends signs of life and reads those of the
others. So a host that fails, dies or stops is named in every log at once, and no host waits for it in a collective: the
thread ends the process, for the main thread cannot. Host 0 goes last, since JAX aborts the others where its service,
which host 0 runs, disappears.
"""

from __future__ import annotations

import contextlib
import logging
import math
import posix
import select
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from jaxalign.hosts.link import Link, as_line
from jaxalign.mistake import Mistake
from jaxalign.outside import Fields, brief

log = logging.getLogger(__name__)

OTHERS = 3  # exit status of a host that ends because of another
TICK = 0.2  # seconds between looks at the clock
BEAT = 5.0  # seconds between signs of life
SILENCE = 45.0  # seconds without one after which a host counts as lost
CAUSE = 1.0  # seconds in which an error turns out to be the consequence of another host's end
GRACE = 20.0  # seconds that a host has to end by itself once another has failed
MEETING = 20.0  # seconds in which all hosts come to the point between two steps at which one has failed
LAST_SAVE = 900.0  # seconds that a checkpoint may take which all hosts save together after a failure
PARTING = 5.0  # seconds that host 0 waits for the others to be gone
MESSAGE = 1000  # characters of another host's error


endings: list[Callable[[], None]] = []  # called before a process ends that cannot end by itself


class HostError(Exception):
    """Another host has failed."""

    def __init__(self, text: str, *, together: bool):
        """Args: together: all hosts have come to the same point between two steps, so they can save."""
        super().__init__(text)
        self.together = together


class Watch:
    """One per process; its thread runs until the process ends, or all hosts have come to their end."""

    def __init__(self, host: int, names: list[str], links: dict[int, Link]):
        self.host, self._names, self._links = host, names, links
        self._condition = threading.Condition()
        self._round = 0
        self._notes: dict[int, dict[int, Any]] = {}  # host 0: of each round that not all have come to
        self._results: dict[int, list[Any]] = {}
        self._failure: str | None = None  # of the first host but this that failed, as a line
        self._final = False  # it is beyond saving together
        self._own: str | None = None  # this host's failure, once the others know it
        self._together = False  # all have come to the same point after a failure
        self._deadline = math.inf
        self._status: int | None = None  # with which the main thread wants the process to end
        self._over = False
        for link in links.values():
            link.connection.settimeout(10.0)
            link.seen = time.monotonic()
        self._thread = threading.Thread(target=self._watch, name="hosts", daemon=True)
        self._thread.start()

    # called by the main thread

    def exchange(self, value: Any, *, last: bool = False) -> list[Any]:
        """Every host's value, in the order of hosts; all must call it the same number of times, and none after `last`.

        Raises:
          HostError: another host has failed.
        """
        number = self._post({"value": value, "last": last})
        with self._condition:
            self._condition.wait_for(lambda: number in self._results or self._final)
            if number not in self._results:
                raise HostError(self._failure or "", together=False)
            notes = self._results.pop(number)
        failed = [host for host, note in enumerate(notes) if "failed" in note]
        if failed:
            self._give(LAST_SAVE, together=True)
            raise HostError(self._line(failed[0], notes[failed[0]]["failed"]), together=True)
        return [note["value"] for note in notes]

    def stop_together(self, error: BaseException) -> bool:
        """Tells the others of an error between two steps. True once they have all come there, so that all can save."""
        if isinstance(error, HostError):
            return error.together
        if self._is_consequence(error):
            return False
        self._own = text_of(error)
        self._send({"failed": self._own, "host": self.host, "final": False})
        number = self._post({"failed": self._own})
        with self._condition:
            if not self._condition.wait_for(lambda: number in self._results or self._final, MEETING):
                return False
            if number not in self._results:
                return False
        self._give(LAST_SAVE, together=True)
        return True

    def tell(self, error: BaseException) -> None:
        """Tells the others that this host ends by an error, unless another host's end has caused it."""
        if isinstance(error, HostError) or self._together or (self._own is None and self._is_consequence(error)):
            return
        self._own = self._own or text_of(error)
        self._send({"failed": self._own, "host": self.host, "final": True})
        self._give(GRACE + PARTING)

    def follow(self, error: BaseException) -> None:
        """Ends the process where another host has failed, and not this one; its line has been logged."""
        caused = self._failure is not None and not isinstance(error, Mistake)
        if self._own is None and (caused or isinstance(error, HostError)):
            self._end(OTHERS)

    def leave(self, status: int) -> None:
        """Ends the process if this host has failed; JAX would wait for the others, who cannot come."""
        if self._own is not None:
            self._end(status)

    def part(self) -> None:
        """Waits for all hosts to come to their end, after which none is missed."""
        self.leave(1)
        try:
            self.exchange(None, last=True)
        except HostError:
            self._end(OTHERS)
        self._thread.join()
        for link in self._links.values():
            link.close()

    def _post(self, note: dict[str, Any]) -> int:
        number, self._round = self._round, self._round + 1
        if self.host == 0:
            self._take(number, 0, note)
        else:
            self._links[0].send({"round": number, "note": note})
        return number

    def _is_consequence(self, error: BaseException) -> bool:
        """True if another host has failed, or turns out to have; a Mistake is always this host's own."""
        if isinstance(error, Mistake):
            return False
        with self._condition:
            return self._condition.wait_for(lambda: self._failure is not None, CAUSE)

    def _send(self, message: dict[str, Any], *, besides: int | None = None) -> None:
        """Sends to host 0, or from it to all but one."""
        line = as_line(message)
        for host, link in self._links.items():
            if link.is_open and host != besides:
                link.send_line(line)

    def _give(self, seconds: float, *, together: bool = False) -> None:
        """Sets the time that this process has to end by itself."""
        with self._condition:
            self._together = self._together or together
            self._deadline = time.monotonic() + seconds

    def _end(self, status: int) -> None:
        """Has the thread end the process. Does not return."""
        self._status = status
        self._thread.join(2 * PARTING)
        posix._exit(status)

    # called by the thread; `_take` and `_conclude` by both

    def _watch(self) -> None:
        try:
            self._run()
        except BaseException:
            log.exception("the watch on the other hosts has failed, so this one ends")
            posix._exit(1)

    def _run(self) -> None:
        last_beat = -math.inf
        while not self._over:
            self._read()
            now = time.monotonic()
            if now - last_beat > BEAT:
                last_beat = now
                self._send({"alive": True})
            for host, link in self._links.items():
                if link.is_open and now - link.seen > SILENCE:
                    self._lose(host, f"has not answered for {SILENCE:.0f} s: it is stopped, or cut off")
            if self._status is not None:
                self._exit(self._status)
            if now > self._deadline:
                if self._own is not None:
                    log.error("this host has failed, and does not end by itself: %s", self._own)
                self._exit(OTHERS if self._own is None else 1)

    def _read(self) -> None:
        """Handles what has come, waiting a tick for it."""
        hosts = {link.connection: host for host, link in self._links.items() if link.is_open}
        if not hosts:
            time.sleep(TICK)
            return
        for connection in select.select(list(hosts), [], [], TICK)[0]:
            host = hosts[connection]
            try:
                for message in self._links[host].receive():
                    self._handle(message, host)
            except (OSError, Mistake):
                self._links[host].close()
                if not self._over:
                    self._lose(host, "has ended without a word: it was killed, or its machine is gone")

    def _handle(self, message: Fields, sender: int) -> None:
        if "round" in message:
            self._take(message.get("round", int), sender, message.get("note", dict))
        elif "notes" in message:
            self._conclude(message.get("of", int), message.get("notes", list))
        elif "failed" in message:
            if self.host == 0:
                self._send(message.content, besides=sender)
            self._fail(self._line(message.get("host", int), message.get("failed", str)), message.get("final", bool))
        elif "lost" in message:
            self._fail(message.get("lost", str), True)
            self._exit(OTHERS)
        elif "left" in message:
            self._give(CAUSE)

    def _take(self, number: int, host: int, note: dict[str, Any]) -> None:
        """Host 0 takes a host's note of a round, and sends all of them once all have come."""
        with self._condition:
            notes = self._notes.setdefault(number, {})
            notes[host] = note
            if len(notes) <= len(self._links):
                return
            del self._notes[number]
        result = [notes[host] for host in sorted(notes)]
        self._conclude(number, result)
        self._send({"of": number, "notes": result})

    def _conclude(self, number: int, notes: list[Any]) -> None:
        with self._condition:
            self._over = all(note.get("last") for note in notes)  # so a link that ends now is no loss
            self._results[number] = notes
            self._condition.notify_all()

    def _fail(self, line: str, final: bool) -> None:
        """Another host has failed: logged once, at once."""
        with self._condition:
            is_news = self._failure is None and self._own is None
            self._failure = self._failure or line
            self._final = self._final or final
            if not self._together:
                self._deadline = min(self._deadline, time.monotonic() + (GRACE if final else MEETING + GRACE))
            self._condition.notify_all()
        if is_news:
            log.error("%s", line)

    def _lose(self, host: int, how: str) -> None:
        """A host is gone. If it failed before, this host follows soon; else it says so, and ends."""
        self._links[host].close()
        if self._failure is not None or self._own is not None:
            if self.host == 0:
                self._send({"left": host})
            if self._own is None:
                self._give(CAUSE)
            return
        line = f"host {host} ({self._names[host]}) {how}. Start the same command again: it continues"
        self._fail(line, True)
        if self.host == 0:
            self._send({"lost": line})
        self._exit(OTHERS)

    def _line(self, host: int, text: str) -> str:
        return f"host {host} ({self._names[host]}) has failed: {brief(text, MESSAGE)}"

    def _exit(self, status: int) -> None:
        """Ends the process; host 0 once the others are gone."""
        if self.host == 0:
            self._send({"left": 0})
            deadline = time.monotonic() + PARTING
            while time.monotonic() < deadline and any(link.is_open for link in self._links.values()):
                for link in [link for link in self._links.values() if link.is_open]:
                    try:
                        if select.select([link.connection], [], [], TICK)[0]:
                            link.receive()
                    except OSError:
                        link.close()
        for ending in [*endings, sys.stdout.flush, sys.stderr.flush]:
            with contextlib.suppress(Exception):
                ending()
        posix._exit(status)


def text_of(error: BaseException) -> str:
    """The message of an error, with its type unless it is a Mistake."""
    return brief(str(error) if isinstance(error, Mistake) else f"{type(error).__name__}: {error}", MESSAGE)
