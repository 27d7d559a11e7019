"""The lock of a run folder: one process at a time writes into it.

`lock.json` names the process, and a thread renews its time stamp every few seconds. The lock of a process that is gone
is taken, and the log says so: on the same machine once there is no such process; on another once the time stamp is
older than LIMIT. A process that was suspended for so long finds its lock taken (`check`) before it writes again.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import logging
import os
import socket
import threading
import time
import uuid
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

from jaxalign.mistake import Mistake
from jaxalign.outside import Fields, brief, parse_json

log = logging.getLogger(__name__)

FILE = "lock.json"
RENEWED = 5.0  # seconds between signs of life
LIMIT = 120.0  # seconds without one, after which the lock of another machine may be taken
PATIENCE = 10.0  # seconds that writing or taking a lock may last
PAUSE = 0.5  # seconds between two looks at it

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
_held: dict[Path, _Lock] = {}  # by run folder; of this process


class Holder(NamedTuple):
    """The process that a lock names."""

    host: str
    pid: int
    started: str  # a mark of its start, so that a later process of the same number is known as another
    machine: str  # its boot and its table of processes: only there the number means something
    since: str  # the time at which it took the lock

    @classmethod
    def this(cls) -> Holder:
        """The process that runs this."""
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        return cls(socket.gethostname(), os.getpid(), _start_of(os.getpid()) or "", _machine(), since)

    @property
    def is_here(self) -> bool:
        """True if it ran on this machine, so that the machine knows whether it still does."""
        return (self.host, self.machine) == (socket.gethostname(), _machine())

    @property
    def runs(self) -> bool:
        """True if a process of this machine has its number and its start."""
        return _start_of(self.pid) == self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {brief(self.host)}, since {brief(self.since)}"


class _Seen(NamedTuple):
    """A lock file as it was read."""

    path: Path
    text: str
    changed: float  # its time stamp, in seconds

    @property
    def age(self) -> float:
        """Seconds since the time stamp, by the clock that stamps files in its folder, which may be a server's."""
        probe = self.path.with_name(f"{FILE}.{uuid.uuid4().hex}")
        try:
            with open(probe, "x") as file:
                now = os.fstat(file.fileno()).st_mtime
            probe.unlink()
        except OSError:  # a folder that cannot be written is looked at only
            now = time.time()
        return max(now - self.changed, 0.0)

    @property
    def holder(self) -> Holder | None:
        """None where the file is unfinished or damaged."""
        try:
            fields = Fields(parse_json(self.text, FILE), FILE)
            texts = (fields.get(name, str) for name in ("started", "machine", "since"))
            return Holder(fields.get("host", str), fields.get("pid", int), *texts)
        except Mistake:
            return None

    def __str__(self) -> str:
        who = "a process that cannot be read from it" if self.holder is None else str(self.holder)
        return f"{who}, whose last sign of life was {self.age:.0f} s ago"


def acquire(folder: Path) -> None:
    """Makes a run folder this process's until `release`. A lock that this process has already stays as it is.

    Raises:
      Mistake: another process has it, or the folder cannot be written.
    """
    folder = Path(folder).absolute()
    if folder in _held:
        return _held[folder].check()
    path = folder / FILE
    text = json.dumps(Holder.this()._asdict() | {"token": uuid.uuid4().hex})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while not _create(path, text):
            stale = _unless_alive(folder)
            if stale is not None and _take(stale, text):
                log.warning("%s was locked by %s: that process is gone, and its lock is taken", folder, stale)
                break
    except OSError as error:
        raise Mistake(f"`output` {folder} cannot be written ({error.strerror}); name another folder") from None
    if not _held:
        from jaxalign import hosts  # which loads JAX, and the command line reads this module

        atexit.register(release_all)
        hosts.at_end(release_all)
    _held[folder] = _Lock(path, text)


def refuse_if_held(folder: Path) -> None:
    """Raises Mistake if a process other than this one has the folder."""
    folder = Path(folder).absolute()
    if folder not in _held and folder.is_dir():
        _unless_alive(folder)


def check(folder: Path) -> None:
    """Raises Mistake if this process had the folder's lock and another has taken it; call it before writing."""
    lock = _held.get(Path(folder).absolute())
    if lock is not None:
        lock.check()


def released_on_error(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The function, whose first argument is a run; where it raises, the run's folder is given back."""

    @functools.wraps(function)
    def wrapped(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        try:
            return function(*args, **kwargs)
        except BaseException:
            release(args[0].folder)  # pyright: ignore[reportAttributeAccessIssue]
            raise

    return wrapped


def release(folder: Path) -> None:
    """Gives the folder back, if this process has it."""
    lock = _held.pop(Path(folder).absolute(), None)
    if lock is not None:
        lock.end()


def release_all() -> None:
    """Gives back all folders of this process."""
    for folder in list(_held):
        release(folder)


class _Lock:
    """A lock that this process has, with the thread that renews it."""

    def __init__(self, path: Path, text: str):
        self._path, self._text, self._pid = path, text, os.getpid()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lock of a run folder", daemon=True)
        self._thread.start()

    def check(self) -> None:
        with contextlib.suppress(OSError):  # a disk that is away for a moment has not been given to somebody else
            seen = _read(self._path)
            if seen is None and not _create(self._path, self._text):  # somebody has deleted the file
                seen = _read(self._path)
            if seen is not None and seen.text != self._text:
                raise Mistake(
                    f"`output` {self._path.parent} has been taken by {seen.holder or 'another process'}, since this "
                    f"process gave no sign of life for more than {LIMIT:.0f} s. It stops, and leaves the folder to the "
                    "other; to go on here, end that one and run the same command again"
                )

    def end(self) -> None:
        if os.getpid() != self._pid:  # a child that was forked
            return
        self._ending.set()
        self._thread.join(timeout=PAUSE)
        with contextlib.suppress(OSError):
            if (seen := _read(self._path)) is not None and seen.text == self._text:
                self._path.unlink()

    def _renew(self) -> None:
        while not self._ending.wait(RENEWED):
            with contextlib.suppress(OSError):
                if (seen := _read(self._path)) is not None and seen.text == self._text:
                    os.utime(self._path)


def _unless_alive(folder: Path) -> _Seen | None:
    """A lock whose process is gone; None without a lock. Watches that of another machine until it moves or is too old.

    Raises Mistake if the process is alive.
    """
    path, first = folder / FILE, None
    while (seen := _read(path)) is not None:
        holder = seen.holder
        if holder is not None and holder.is_here:
            # a lock of this very process that `_held` does not know could not be deleted
            if not holder.runs or holder.pid == os.getpid():
                return seen
            break
        if seen.age > (PATIENCE if holder is None else LIMIT):
            return seen
        if first is None or first.text != seen.text:
            first = seen
            if holder is not None:
                log.info("%s is locked by %s; it is taken once there was none for %.0f s", folder, seen, LIMIT)
        if first.changed != seen.changed:
            break
        time.sleep(PAUSE)
    if seen is not None:
        raise Mistake(
            f"`output` {folder} is in use by {seen}. Wait until it ends, or end it and run this command again, which "
            "goes on where it stopped; or name another folder"
        )
    return None


def _take(stale: _Seen, text: str) -> bool:
    """Puts our lock in the place of one whose process is gone; False if it is no longer there, or another takes it.

    A lock has one marker, named for its text, and only who has made the marker may put another in its place.
    """
    path = stale.path
    marker = path.with_name(f"{FILE}.{zlib.crc32(stale.text.encode()):08x}")
    if not _create(marker, text):
        other = _read(marker)
        if other is not None and other.age > PATIENCE:  # who made it is gone as well
            marker.unlink(missing_ok=True)
        time.sleep(PAUSE)
        return False
    partial = path.with_name(f"{FILE}.{uuid.uuid4().hex}")
    try:
        current = _read(path)
        if current is None or current.text != stale.text:
            return False
        partial.write_text(text)
        os.replace(partial, path)
        return True
    finally:
        partial.unlink(missing_ok=True)
        marker.unlink(missing_ok=True)


def _create(path: Path, text: str) -> bool:
    """Writes a file that was not there; False if it was. Of several processes, on any machines, one makes it."""
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True


def _read(path: Path) -> _Seen | None:
    """The lock in a file; None where there is none. Opening it makes network file systems look anew."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            changed, text = os.fstat(file.fileno()).st_mtime, file.read(1 << 16)
    except FileNotFoundError:
        return None
    return _Seen(path, text, changed)


def _start_of(pid: int) -> str | None:
    """A mark of the start of a process of this machine; None if there is none, "" where the system tells no start."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]  # the 22nd field of proc_pid_stat(5)
    except (OSError, ValueError, IndexError):
        if Path("/proc/self/stat").exists():
            return None
    try:
        os.kill(pid, 0)
    except PermissionError:
        pass
    except OSError:
        return None
    return ""


@functools.cache
def _machine() -> str:
    """The boot of this machine and its table of processes, which a container has for itself."""
    parts: list[Any] = []
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)
