"""Several hosts as one run: they join, compare their settings, share work, and fail together with one message."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable

import jax
import numpy as np

from jaxalign.mistake import Mistake

MESSAGE_BYTES = 2000  # length of an error message, in UTF-8, as other hosts receive it; the rest is cut off


def join() -> None:
    """Joins the other processes of the run.

    TPU pods, Slurm, Open MPI and Kubernetes provide JAX with their addresses; elsewhere JAX_COORDINATOR_ADDRESS
    (host:port of the first process), JAX_NUM_PROCESSES and JAX_PROCESS_ID do.

    Raises:
      Mistake: no other processes are found, only some of the three variables are set, or one is not a number.
    """
    if jax.distributed.is_initialized():
        return
    names = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
    address, count, index = values = [os.environ.get(name) for name in names]
    if not any(values):
        try:
            jax.distributed.initialize()
        except ValueError as error:
            raise Mistake(
                f"`distributed` found no other processes ({error}); a TPU pod or Slurm provides them, elsewhere set "
                f"{', '.join(names)}"
            ) from None
        return
    absent = [name for name, value in zip(names, values, strict=True) if not value]
    if absent:
        raise Mistake(f"`distributed`: {', '.join(absent)} is not set, though others of {', '.join(names)} are")
    assert count is not None and index is not None
    if not (count.isdigit() and index.isdigit()):
        raise Mistake(f"`distributed`: JAX_NUM_PROCESSES={count} and JAX_PROCESS_ID={index} must be numbers")
    jax.distributed.initialize(address, int(count), int(index))


def agree(**values: str | int) -> None:
    """Raises Mistake on every host if one of `values` is not the same on all of them.

    Without it, hosts with other settings or data would train on unnoticed, or hang in the first collective.
    """
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    digests = np.array([zlib.crc32(str(value).encode()) for value in values.values()], np.uint32)
    of_hosts = multihost_utils.process_allgather(digests)
    names, differs = np.array(list(values)), of_hosts != of_hosts[0]
    others = np.flatnonzero(differs.any(1))
    if others.size:
        raise Mistake(
            f"the hosts differ in {', '.join(names[differs.any(0)])}: hosts {', '.join(map(str, others))} have another "
            f"than host 0 (this is host {jax.process_index()}). Start the same command on the same files everywhere"
        )


def first_decides(decide: Callable[[], bool]) -> bool:
    """The answer of `decide`, which runs on host 0 only, on every host: one host inspects a folder it may be creating.

    Raises:
      Exception: on host 0, what `decide` raised.
      Mistake: on the other hosts, with host 0's message.
    """
    if jax.process_count() == 1:
        return decide()
    from jax.experimental import multihost_utils

    answer, error = False, None
    if jax.process_index() == 0:
        try:
            answer = decide()
        except Exception as raised:
            error = raised
    reply = np.concatenate([np.array([error is not None, answer], np.uint8), _as_bytes(error)])
    failed, answer, *message = multihost_utils.broadcast_one_to_all(reply)
    if error is not None:
        raise error
    if failed:
        raise Mistake(f"host 0 stopped: {_as_text(message)}")
    return bool(answer)


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
      Mistake: on the other hosts, with that host's message.
    """
    return _gathered(compute, rows, [_share_of(columns, host) for host in range(jax.process_count())])


def _gathered(compute: Callable[[slice], np.ndarray], rows: int, shares: list[slice]) -> np.ndarray:
    """The results for all shares of columns side by side; a host whose share is empty does not compute."""
    from jax.experimental import multihost_utils

    own, error = shares[jax.process_index()], None
    widest = max(s.stop - s.start for s in shares)
    result, succeeded = np.zeros((rows, widest), np.float32), np.ones((rows, 1), np.float32)
    try:
        if own.stop > own.start:
            result[:, : own.stop - own.start] = compute(own)
    except Exception as raised:
        error, succeeded[:] = raised, 0.0
    of_hosts = np.asarray(multihost_utils.process_allgather(np.concatenate([result, succeeded], axis=1)))
    failed = np.flatnonzero(of_hosts[:, 0, -1] == 0)
    if failed.size:
        messages = multihost_utils.process_allgather(_as_bytes(error))
        if error is not None:
            raise error
        raise Mistake(f"host {failed[0]} has failed: {_as_text(messages[failed[0]])}")
    return np.concatenate([part[:, : s.stop - s.start] for part, s in zip(of_hosts, shares, strict=True)], axis=1)


def _as_bytes(error: Exception | None) -> np.ndarray:
    """Uint8[MESSAGE_BYTES], the message of an error, filled up with zeros; with its type unless it is a Mistake."""
    text = "" if error is None else str(error) if isinstance(error, Mistake) else f"{type(error).__name__}: {error}"
    return np.frombuffer(text.encode()[:MESSAGE_BYTES].ljust(MESSAGE_BYTES, b"\0"), np.uint8)


def _as_text(message: np.ndarray | list[int]) -> str:
    """The inverse of `_as_bytes`; a character that was cut through is left out."""
    return bytes(np.asarray(message, np.uint8)).rstrip(b"\0").decode(errors="ignore")


def gather(x: jax.Array | np.ndarray) -> np.ndarray:
    """The whole array on every host, wherever its shards are; all hosts must call it."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def largest(value: int) -> int:
    """The largest of all hosts' values, on every host."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(np.max(multihost_utils.process_allgather(np.int32(value))))


def barrier(name: str) -> None:
    """Waits until every host has come to the barrier of this name."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def _share_of(count: int, host: int) -> slice:
    """The rows of a host, of `count`."""
    hosts = jax.process_count()
    return slice(host * count // hosts, (host + 1) * count // hosts)
