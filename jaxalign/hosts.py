"""Several hosts as one run: they join, and agree before the first step that they run the same thing."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable

import jax
import numpy as np

from jaxalign.mistake import Mistake
from jaxalign.types import PyTree


def join() -> None:
    """Joins the other processes of the run.

    TPU pods, Slurm, Open MPI and Kubernetes tell JAX who they are; elsewhere JAX_COORDINATOR_ADDRESS (host:port of the
    first process), JAX_NUM_PROCESSES and JAX_PROCESS_ID do.

    Raises:
      Mistake: there is no sign of others, only some of the three are set, or one is not a number.
    """
    if jax.distributed.is_initialized():
        return
    names = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
    given = [os.environ.get(name) for name in names]
    if not any(given):
        try:
            jax.distributed.initialize()
        except ValueError as error:
            raise Mistake(
                f"`distributed` found no other processes ({error}); a TPU pod or Slurm tells them, elsewhere set "
                f"{', '.join(names)}"
            ) from None
        return
    absent = [name for name, value in zip(names, given, strict=True) if not value]
    if absent:
        raise Mistake(f"`distributed`: {', '.join(absent)} is not set, though others of {', '.join(names)} are")
    if not (given[1].isdigit() and given[2].isdigit()):
        raise Mistake(f"`distributed`: JAX_NUM_PROCESSES={given[1]} and JAX_PROCESS_ID={given[2]} must be numbers")
    jax.distributed.initialize(given[0], int(given[1]), int(given[2]))


def agree(**values: str | int) -> None:
    """Raises Mistake on every host when one of `values` is not the same on all of them.

    Hosts that run other settings, or read other data, would train on without a word, or hang in the first collective.
    """
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    digests = np.array([zlib.crc32(str(value).encode()) for value in values.values()], np.uint32)
    seen = multihost_utils.process_allgather(digests)
    names = np.array(list(values))
    others, which = np.flatnonzero((seen != seen[0]).any(1)), (seen != seen[0]).any(0)
    if others.size:
        raise Mistake(
            f"the hosts differ in {', '.join(names[which])}: hosts {', '.join(map(str, others))} have another than "
            f"host 0 (this is host {jax.process_index()}). Start the same command on the same files everywhere"
        )


def first_decides(decide: Callable[[], bool]) -> bool:
    """What `decide` says on the first host, on all of them: it alone looks at a folder while it makes it.

    Raises:
      RuntimeError: it raised there.
    """
    if jax.process_count() == 1:
        return decide()
    from jax.experimental import multihost_utils

    said, error = -1, None
    if jax.process_index() == 0:
        try:
            said = int(decide())
        except (ValueError, OSError) as raised:
            error = raised
    said = int(multihost_utils.broadcast_one_to_all(np.int32(said)))
    if error is not None:
        raise error
    if said < 0:
        raise Mistake("host 0 refused to start; its message says why")
    return bool(said)


def from_first(make: Callable[[], np.ndarray], kinds: int, count: int) -> np.ndarray:
    """Float32[kinds count] that `make` gives on the first host, on all of them: what it asks others for is asked once.

    Raises what `from_each` does.
    """
    others = [slice(count, count)] * (jax.process_count() - 1)
    return _gathered(lambda _: make(), kinds, [slice(0, count), *others])


def from_each(make: Callable[[slice], np.ndarray], kinds: int, count: int) -> np.ndarray:
    """Float32[kinds count] of which `make` gives each host its own columns, [kinds, those], on all of them.

    Raises:
      RuntimeError: it raised on another host; where it did, it raises what it raised.
    """
    return _gathered(make, kinds, [_own(count, host) for host in range(jax.process_count())])


def _gathered(make: Callable[[slice], np.ndarray], kinds: int, parts: list[slice]) -> np.ndarray:
    """What `make` gives of every host's part, side by side; a host whose part is empty does not call it."""
    from jax.experimental import multihost_utils

    mine, error = parts[jax.process_index()], None
    said = np.zeros((kinds, max(part.stop - part.start for part in parts) + 1), np.float32)
    try:
        if mine.stop > mine.start:
            said[:, : mine.stop - mine.start] = make(mine)
        said[:, -1] = 1.0  # says that it did not fail
    except Exception as raised:
        error = raised
    all_said = np.asarray(multihost_utils.process_allgather(said))
    if error is not None:
        raise error
    failed = [host for host, found in enumerate(all_said) if not found[0, -1]]
    if failed:
        raise Mistake(f"host {failed[0]} has failed; its message says why")
    return np.concatenate([found[:, : part.stop - part.start] for found, part in zip(all_said, parts, strict=True)], 1)


def share(batch: PyTree) -> PyTree:
    """This host's rows of a batch that all hosts have."""
    return jax.tree.map(lambda x: x[_own(len(x), jax.process_index())], batch)


def _own(count: int, host: int) -> slice:
    """Which of `count` rows are a host's."""
    hosts = jax.process_count()
    return slice(host * count // hosts, (host + 1) * count // hosts)
