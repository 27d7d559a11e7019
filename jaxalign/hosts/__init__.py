"""Several hosts as one run: they join, compare their settings, share work, and end together when one of them fails.

`watch.py` tells how they end. A host that fails prints its own error and exits as it would alone; every other logs one
line that names it, and exits with status 3.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from jaxalign.hosts.meeting import Place, meet
from jaxalign.hosts.watch import Watch, endings
from jaxalign.mistake import Mistake
from jaxalign.outside import brief

JOIN_SECONDS = 120  # that JAX may take once all hosts are there
_watch: Watch | None = None


def join() -> None:
    """Joins the other processes of the run.

    TPU pods, Slurm, Open MPI and Kubernetes provide JAX with their addresses; elsewhere JAX_COORDINATOR_ADDRESS
    (host:port of the first process), JAX_NUM_PROCESSES and JAX_PROCESS_ID do.

    Raises:
      Mistake: no other processes are found, some do not come, only some of the three variables are set, or one is not
        a number.
    """
    global _watch
    if _watch is not None:
        return
    if jax.distributed.is_initialized():
        place, local_devices = _place_of_joined(), None
    else:
        place, local_devices = _place()
    links, names = meet(place) if place.count > 1 else ({}, [""])
    if place.count > 1:
        _watch = Watch(place.host, names, links)
        atexit.register(_watch.part)  # runs before JAX's own, which is older
    if not jax.distributed.is_initialized():
        # it would take SIGTERM from a process that is not in training, and do nothing
        jax.config.update("jax_enable_preemption_service", False)
        with failing_together():
            jax.distributed.initialize(
                place.address, place.count, place.host, local_devices, initialization_timeout=JOIN_SECONDS
            )


def _place() -> tuple[Place, Any]:
    """Meeting place of the hosts, and the devices of this process, by the environment. Raises Mistake."""
    from jax._src.clusters import ClusterEnv  # JAX has no public function that returns what it would join

    names = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
    address, count, index = values = [os.environ.get(name) for name in names]
    absent = [name for name, value in zip(names, values, strict=True) if not value]
    if any(values) and absent:
        raise Mistake(f"`distributed`: {', '.join(absent)} is not set, though others of {', '.join(names)} are")
    if count and index and not (count.isdigit() and index.isdigit()):
        raise Mistake(f"`distributed`: JAX_NUM_PROCESSES={count} and JAX_PROCESS_ID={index} must be numbers")
    if count and index and int(index) >= int(count):
        raise Mistake(f"`distributed`: JAX_PROCESS_ID={index} must be below JAX_NUM_PROCESSES={count}, beginning at 0")
    try:
        address, of, host, local_devices = ClusterEnv.auto_detect_unset_distributed_params(
            address or None, int(count) if count else None, int(index) if index else None, None, None, JOIN_SECONDS
        )
    except (RuntimeError, OSError) as error:
        raise Mistake(f"`distributed`: JAX cannot find the other processes ({brief(str(error), 200)})") from error
    if address is None or of is None or host is None:
        raise Mistake(
            "`distributed` found no other processes; a TPU pod or Slurm provides them, elsewhere set "
            f"{', '.join(names)}"
        )
    if not address.rpartition(":")[2].isdigit() or not address.rpartition(":")[0]:
        raise Mistake(
            f"`distributed`: JAX_COORDINATOR_ADDRESS={brief(address)} must be HOST:PORT, of the first process"
        )
    return Place(address, of, host, os.environ.get("JAX_COORDINATOR_BIND_ADDRESS") or None), local_devices


def _place_of_joined() -> Place:
    """Meeting place of hosts that JAX has joined already: host 0, and a port that is free there."""
    import socket

    from jax._src.distributed import global_state
    from jax.experimental import multihost_utils

    with socket.create_server(("", 0)) as free:
        port = int(multihost_utils.broadcast_one_to_all(np.int32(free.getsockname()[1])))
    address = str(global_state.coordinator_address).rpartition(":")[0]
    return Place(f"{address}:{port}", jax.process_count(), jax.process_index())


@contextlib.contextmanager
def telling_others() -> Iterator[None]:
    """Tells the other hosts at once of an error that leaves the block."""
    try:
        yield
    except BaseException as error:
        if _watch is not None:
            _watch.tell(error)
        raise


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Tells the other hosts of an error that leaves the block; ends this process where the error is another host's."""
    try:
        with telling_others():
            yield
    except BaseException as error:
        if _watch is not None:
            _watch.follow(error)
        raise


def at_end(function: Callable[[], None]) -> None:
    """Calls the function also where this process is ended, while its main thread waits for a host that has failed."""
    endings.append(function)


def stop_together(error: Exception) -> bool:
    """Tells all hosts of an error between two steps; True if all have come to that point, so that all can save."""
    return _watch is None or _watch.stop_together(error)


def leave(status: int) -> int:
    """The exit status of a process that ends now. Does not return where other hosts wait for it in vain."""
    if _watch is not None:
        _watch.leave(status)
    return status


def exchange(value: Any) -> list[Any]:
    """Every host's value, which JSON can hold, in the order of hosts. All must call it; devices have no part in it.

    Raises:
      HostError: another host has failed.
    """
    if _watch is None:
        assert jax.process_count() == 1, "hosts.join() has not been called"
        return [value]
    return _watch.exchange(value)


def agree(**values: str | int) -> None:
    """Raises Mistake on every host if one of `values` is not the same on all of them.

    Without it, hosts with other settings or data would train on unnoticed, or hang in the first collective.
    """
    first, *others = exchange({name: zlib.crc32(str(value).encode()) for name, value in values.items()})
    differing = {host: [n for n in values if own.get(n) != first.get(n)] for host, own in enumerate(others, start=1)}
    names = [name for name in values if any(name in differs for differs in differing.values())]
    if names:
        hosts = ", ".join(str(host) for host, differs in differing.items() if differs)
        raise Mistake(
            f"the hosts differ in {', '.join(names)}: hosts {hosts} have another than host 0 (this is host "
            f"{jax.process_index()}). Start the same command on the same files everywhere"
        )


def first_decides(decide: Callable[[], bool]) -> bool:
    """The answer of `decide`, which runs on host 0 only, on every host: one host inspects a folder it may be creating.

    Raises:
      Exception: on host 0, what `decide` raised.
      HostError: on the other hosts, once host 0 has failed.
    """
    return exchange(decide() if jax.process_index() == 0 else None)[0]


def run_on_first(compute: Callable[[], np.ndarray], rows: int, columns: int) -> np.ndarray:
    """Float32[rows columns], which `compute` returns on host 0 only (it may call a paid service), on every host.

    Raises as `run_on_each` does.
    """
    others = [slice(columns, columns)] * (jax.process_count() - 1)
    return _gathered(lambda _: compute(), rows, [slice(0, columns), *others])


def run_on_each(compute: Callable[[slice], np.ndarray], rows: int, columns: int) -> np.ndarray:
    """Float32[rows columns] on every host; `compute` returns [rows, those] for a slice, each host's share of columns.

    Raises:
      Exception: on a host where `compute` failed, what it raised.
      HostError: on the other hosts, once it has failed.
    """
    return _gathered(compute, rows, [_share_of(columns, host) for host in range(jax.process_count())])


def _gathered(compute: Callable[[slice], np.ndarray], rows: int, shares: list[slice]) -> np.ndarray:
    """The results for all shares of columns side by side; a host whose share is empty does not compute."""
    own = shares[jax.process_index()]
    part = np.asarray(compute(own), np.float32).tolist() if own.stop > own.start else None
    parts = [np.array(part, np.float32).reshape(rows, -1) for part in exchange(part) if part is not None]
    return np.concatenate(parts, axis=1)


def gather(x: jax.Array | np.ndarray) -> np.ndarray:
    """The whole array on every host, wherever its shards are; all hosts must call it."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def barrier(name: str) -> None:
    """Waits until every host has come to the barrier of this name."""
    names = exchange(name)
    assert names == [name] * len(names), names


def _share_of(count: int, host: int) -> slice:
    """The rows of a host, of `count`."""
    hosts = jax.process_count()
    return slice(host * count // hosts, (host + 1) * count // hosts)
