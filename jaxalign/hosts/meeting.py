"""The meeting of all hosts before JAX starts: who has come under which number, and who has not.

Host 0 listens at the address that JAX's own service will have, so no further port is needed, and gives it up once all
are there. The connections stay, and `watch.py` goes on with them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import time
from typing import NamedTuple

from jaxalign.hosts.link import LIMIT, Link
from jaxalign.mistake import Mistake
from jaxalign.outside import Fields, brief

log = logging.getLogger(__name__)

PATIENCE = 45.0  # seconds without a missing host after which a line says which it is, and between such lines
LONGEST = 600.0  # seconds until a meeting ends without those who are missing; machines of a pod start minutes apart
RETRY = 0.5  # seconds between attempts to reach host 0
PORT_SECONDS = 20.0  # for which an earlier run may still have the port


class Place(NamedTuple):
    """Meeting place of the hosts, and the number of this one."""

    address: str  # host:port of host 0
    count: int  # of hosts
    host: int
    bind: str | None = None  # the address under which host 0 listens, where it is another

    @property
    def port(self) -> int:
        return int((self.bind or self.address).rpartition(":")[2])


def meet(place: Place) -> tuple[dict[int, Link], list[str]]:
    """(links, names of all hosts): host 0 has a link to every other, and each of them one to host 0.

    Raises:
      Mistake: some have not come in `LONGEST` seconds, this host's number is taken, or the hosts differ in their count.
    """
    name = socket.gethostname()
    return _receive(place, name) if place.host == 0 else _visit(place, name)


class _Patience:
    """Logs why a meeting waits, now and then, and ends it."""

    def __init__(self, longest: float) -> None:
        self._longest = longest
        self._start = self._last = time.monotonic()

    def heard(self) -> None:
        """Another host has said why it waits, so this one is silent for a while."""
        self._last = time.monotonic()

    def check(self, missing: str, way_out: str) -> str | None:
        """The text of a line that is due, which has been logged. Raises Mistake at the end of patience."""
        now = time.monotonic()
        waited = f"{missing} within {now - self._start:.0f} s; {way_out}"
        if now - self._start > self._longest:
            raise Mistake(f"`distributed`: {waited}")
        if now - self._last < PATIENCE:
            return None
        self._last = now
        log.warning("%s", text := f"{waited}. Waiting for up to {self._longest / 60:.0f} minutes")
        return text


def _receive(place: Place, name: str) -> tuple[dict[int, Link], list[str]]:
    """Host 0 admits the others as they come."""
    links: dict[int, Link] = {}
    patience = _Patience(LONGEST)
    with selectors.DefaultSelector() as selector, _listener(place) as listener:
        selector.register(listener, selectors.EVENT_READ)
        while len(links) < place.count - 1:
            for key, _ in selector.select(RETRY):
                if key.fileobj is listener:
                    link = Link(listener.accept()[0])
                    selector.register(link.connection, selectors.EVENT_READ, link)
                    continue
                link = key.data
                try:
                    for message in link.receive():
                        _admit(message, link, links, place)
                except (OSError, Mistake):  # it has gone, or is none of ours
                    selector.unregister(link.connection)
                    link.close()
                    if links.get(link.host) is link:
                        del links[link.host]
            missing = [host for host in range(1, place.count) if host not in links]
            try:
                text = missing and patience.check(
                    f"{_listed(missing)} of {place.count} {'has' if len(missing) == 1 else 'have'} not joined",
                    f"start the same command there, where host 0 must be reachable at {place.address}",
                )
            except Mistake as mistake:
                _send_all(links, {"refused": str(mistake)})
                raise
            if text:
                _send_all(links, {"waiting": text})
    names = [name] + [links[host].name for host in sorted(links)]
    _send_all(links, {"go": names})
    return links, names


def _admit(message: Fields, link: Link, links: dict[int, Link], place: Place) -> None:
    """Takes a host in by its greeting, or sends it away with the reason, which host 0 logs too."""
    host, of = message.get("jaxalign", int), message.get("of", int)
    link.host, link.name, link.process = host, brief(message.get("name", str)), message.get("process", int)
    way_out = f"JAX_PROCESS_ID, or the launcher, must give each process a number of its own, 0 to {place.count - 1}"
    if of != place.count or not 0 <= host < of:
        refusal = f"host {host} ({link.name}) was told of {of} hosts, and host 0 of {place.count}"
    elif host == 0 or host in links:
        first = f"{links[host].name} (process {links[host].process})" if host else "host 0"
        refusal = f"host {host} was started twice: on {first} and on {link.name} (process {link.process}); {way_out}"
    else:
        links[host], link.limit = link, LIMIT
        link.send({"welcome": True})
        return
    log.warning("%s", refusal)
    link.send({"refused": f"`distributed`: {refusal}"})
    link.host = -1
    _send_all(links, {"waiting": refusal})
    raise Mistake(refusal)


def _send_all(links: dict[int, Link], message: dict) -> None:
    for link in links.values():
        link.send(message)


def _visit(place: Place, name: str) -> tuple[dict[int, Link], list[str]]:
    """Comes to host 0, as often as that takes."""
    patience = _Patience(LONGEST + PATIENCE)  # host 0 knows more, so its word comes first
    way_out = (
        f"start the same command there, and see that it can be reached. If a run has begun there without this process, "
        f"host {place.host} was started twice"
    )
    while True:
        link = None
        with contextlib.suppress(OSError):
            link = _greeted(place, name)
            while True:
                with contextlib.suppress(TimeoutError):
                    for message in link.receive():
                        if "refused" in message:
                            raise Mistake(message.get("refused", str))
                        if "waiting" in message:
                            log.warning("%s", brief(message.get("waiting", str), 1000))
                        if "go" in message:
                            link.limit = LIMIT
                            return {0: link}, [brief(text) for text in message.texts("go")]
                        patience.heard()
                patience.check(f"host 0 ({place.address}) has not gone on", way_out)
        if link is not None:
            link.close()
        patience.check(f"host 0 ({place.address}) has not answered", way_out)
        time.sleep(RETRY)


def _greeted(place: Place, name: str) -> Link:
    """A link to whatever listens at the address, which has got our greeting. Raises OSError."""
    where, _, port = place.address.rpartition(":")
    link = Link(socket.create_connection((where.strip("[]"), int(port)), timeout=5.0))
    link.connection.settimeout(RETRY)
    link.host = 0
    link.limit = LIMIT
    link.send({"jaxalign": place.host, "of": place.count, "name": name, "process": os.getpid()})
    return link


def _listener(place: Place) -> socket.socket:
    """A socket that listens on all interfaces, as JAX's service will."""
    where = (place.bind or "").rpartition(":")[0].strip("[]")
    deadline = time.monotonic() + PORT_SECONDS
    while True:
        try:
            if where in ("", "::") and socket.has_dualstack_ipv6():
                return socket.create_server(
                    ("::", place.port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096
                )
            return socket.create_server((where, place.port), backlog=4096)
        except OSError as error:
            if time.monotonic() > deadline:
                raise Mistake(
                    f"`distributed`: host 0 cannot listen on port {place.port} ({error.strerror}); another run has it, "
                    "or host 0 was started twice; end that one, or set another port in JAX_COORDINATOR_ADDRESS"
                ) from None
            time.sleep(RETRY)


def _listed(hosts: list[int]) -> str:
    """`host 1`, or `hosts 1, 2 and 3`, or the first ten of many."""
    if len(hosts) == 1:
        return f"host {hosts[0]}"
    shown, rest = [str(host) for host in hosts[:10]], len(hosts) - 10
    if rest > 0:
        return f"hosts {', '.join(shown)} and {rest} more"
    return f"hosts {', '.join(shown[:-1])} and {shown[-1]}"
