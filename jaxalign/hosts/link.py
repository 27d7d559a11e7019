"""A connection to another host: messages are lines of JSON, and a broken one is a closed one."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from typing import Any

from jaxalign.mistake import Mistake
from jaxalign.outside import Fields, parse_json

STRANGER_LIMIT = 4096  # bytes of a message from somebody who has not been admitted
LIMIT = 1 << 30  # bytes of a message
SEND_SECONDS = 10.0  # after which a host that takes nothing is as good as gone


class ClosedError(OSError):
    """The other side has closed the connection, or sends what is no message of ours."""


class Link:
    """A connection, the host behind it, and the time of its last sign of life."""

    def __init__(self, connection: socket.socket):
        connection.settimeout(SEND_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection, self.limit = connection, STRANGER_LIMIT
        self.host, self.name, self.process = -1, "", 0
        self.seen, self.is_open = time.monotonic(), True
        self._rest = b""
        self._lock = threading.Lock()

    def send(self, message: dict[str, Any]) -> None:
        """Sends a message. A failure closes the link; whoever reads from it notices."""
        self.send_line(as_line(message))

    def send_line(self, line: bytes) -> None:
        """Sends what `as_line` made."""
        with self._lock:
            try:
                self.connection.sendall(line)
            except OSError:
                with contextlib.suppress(OSError):
                    self.connection.shutdown(socket.SHUT_RDWR)

    def receive(self) -> list[Fields]:
        """The messages that have come; waits for some, as long as the connection's timeout.

        Raises:
          ClosedError: there are no more.
          TimeoutError: none came.
        """
        try:
            data = self.connection.recv(1 << 20)
        except TimeoutError:
            raise
        except OSError as error:
            raise ClosedError from error
        *lines, self._rest = (self._rest + data).split(b"\n")
        if not data or len(self._rest) > self.limit:
            raise ClosedError
        self.seen = time.monotonic()
        try:
            return [Fields(parse_json(line.decode(), "a message"), "a message") for line in lines]
        except (Mistake, UnicodeDecodeError) as error:
            raise ClosedError from error

    def close(self) -> None:
        self.is_open = False
        self.connection.close()


def as_line(message: dict[str, Any]) -> bytes:
    """The bytes of a message."""
    return json.dumps(message).encode() + b"\n"
