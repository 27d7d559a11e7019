"""A jitted step that logs its compilations: one executable per batch shape, and a warning for an unexpected one."""

from __future__ import annotations

import ctypes
import logging
import sys
import time
from typing import Any

import jax

log = logging.getLogger(__name__)


class CompiledStep:
    """Calls `jitted(state, frozen, batch)` through one executable per shape of `batch`.

    A compilation costs seconds to minutes, so each is logged with the shape: the first `announced` ones (several with
    length buckets) as information, any other as a warning.
    """

    def __init__(self, jitted: Any, *, announced: int = 1):
        """Args: announced: number of batch shapes that the data is known to have."""
        self._jitted = jitted
        self._announced = announced
        self._executables: dict[tuple, Any] = {}

    def __call__(self, state: Any, frozen: Any, batch: Any) -> tuple[Any, dict[str, jax.Array]]:
        shapes = tuple((x.shape, str(x.dtype)) for x in jax.tree.leaves(batch))
        if shapes not in self._executables:
            self._executables[shapes] = self._compile(shapes, state, frozen, batch)
        return self._executables[shapes](state, frozen, batch)

    def _compile(self, shapes: tuple, state: Any, frozen: Any, batch: Any) -> Any:
        start = time.perf_counter()
        executable = self._jitted.lower(state, frozen, batch).compile()
        seconds = time.perf_counter() - start
        _give_back()
        late = len(self._executables) >= self._announced
        log.log(
            logging.WARNING if late else logging.INFO,
            "the train step was compiled%s for a batch of %s in %.1f s%s",
            " again" if self._executables else "",
            " ".join(sorted({str(list(shape)) for shape, _ in shapes})),
            seconds,
            _memory(executable),
        )
        return executable


def _give_back() -> None:
    """Returns memory freed by the compiler to the operating system; glibc alone would keep hundreds of MiB."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _memory(executable: Any) -> str:
    analysis = executable.memory_analysis()
    if analysis is None:
        return ""
    arguments, temporary = analysis.argument_size_in_bytes / 2**20, analysis.temp_size_in_bytes / 2**20
    return f" (per device: arguments {arguments:,.0f} MiB, temporary {temporary:,.0f} MiB)"
