"""Bytes of generation, said before it starts, and refused where they cannot fit."""

from __future__ import annotations

import logging

import jax

from jaxalign.mistake import Mistake

log = logging.getLogger(__name__)

GIB = 2**30


def check_memory(*, weights: int, slots: int = 0, state: int = 0, limit: int | None = None, way_out: str) -> None:
    """Logs the bytes that each device needs for generation.

    Args:
      weights: bytes of a device's share of the weights that generation reads.
      slots: of its share of the slots, most of them keys and values, with every response at its longest.
      state: of its share of the training state, which is there besides.
      limit: of its memory; by default what the device says, if it does.
      way_out: the settings that make them fewer, for messages.

    Raises:
      Mistake: weights and state alone are more than the limit.
    """
    limit = _limit() if limit is None else limit
    cache = f" + up to {_gib(slots)} of cache" if slots else ""
    besides = f", beside {_gib(state)} of training state" if state else ""
    needs = f"{_gib(weights)} of weights{cache} a device{besides}"
    log.info("decoding: %s", needs)
    if limit is None:
        return
    if weights + state > limit:
        raise Mistake(f"decoding needs {needs}, and a device has {_gib(limit)}; {way_out}")
    if weights + slots + state > limit:
        log.warning(
            "a device has %s, so decoding may run out of memory where responses are long; %s", _gib(limit), way_out
        )


def _limit() -> int | None:
    """Bytes that JAX may use on the first device; None where it does not say."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"
