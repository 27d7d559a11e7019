"""Statistics of the KL from one tile of logits, and its gradient: shared by `kl.py` and its bodies for TPU and GPU."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.kernels.runtime import Target

LOWEST = -1e30  # the peak before any logit, instead of -inf: exp(LOWEST - LOWEST) is 1, not NaN


class Stats(NamedTuple):
    """Statistics [N 1] of the logits seen so far. `merge` is associative and commutative, with `empty` its neutral."""

    peak: jax.Array  # max z
    mass: jax.Array  # Σ exp(z - peak)
    weighted: jax.Array  # Σ exp(z - peak) (z - y)
    ref_peak: jax.Array  # max y
    ref_mass: jax.Array  # Σ exp(y - ref_peak)


class Row(NamedTuple):
    """Values of each token that the backward pass reads, [N 1] each."""

    log_z: jax.Array  # log Σ exp z
    ref_log_z: jax.Array
    kl: jax.Array
    cotangent: jax.Array


class Options(NamedTuple):
    softcap: float | None
    ref_softcap: float | None
    temperature: float
    chunk: int | None  # columns of a tile of "chunked", or of a slab of the kernel's backward; None: by their rows
    target: Target  # body "cpu": no kernel, XLA on any platform
    axis: str | None  # the mesh axis that cuts the vocabulary, inside a shard_map


def empty(rows: int) -> Stats:
    zeros, lowest = jnp.zeros((rows, 1), jnp.float32), jnp.full((rows, 1), LOWEST, jnp.float32)
    return Stats(lowest, zeros, zeros, lowest, zeros)


def of_tile(z: jax.Array, y: jax.Array, fresh: jax.Array) -> Stats:
    """Stats of the columns where `fresh`; the others may be NaN."""
    difference = jnp.where(fresh, z - y, 0.0)
    z, y = jnp.where(fresh, z, LOWEST), jnp.where(fresh, y, LOWEST)
    peak, ref_peak = jnp.max(z, axis=1, keepdims=True), jnp.max(y, axis=1, keepdims=True)
    mass = jnp.exp(z - peak)
    total = functools.partial(jnp.sum, axis=1, keepdims=True)
    return Stats(peak, total(mass), total(mass * difference), ref_peak, total(jnp.exp(y - ref_peak)))


def merge(a: Stats, b: Stats) -> Stats:
    """Stats of the logits of a and of b."""
    peak, ref_peak = jnp.maximum(a.peak, b.peak), jnp.maximum(a.ref_peak, b.ref_peak)
    from_a, from_b = jnp.exp(a.peak - peak), jnp.exp(b.peak - peak)
    ref_mass = a.ref_mass * jnp.exp(a.ref_peak - ref_peak) + b.ref_mass * jnp.exp(b.ref_peak - ref_peak)
    mass, weighted = a.mass * from_a + b.mass * from_b, a.weighted * from_a + b.weighted * from_b
    return Stats(peak, mass, weighted, ref_peak, ref_mass)


def finish(stats: Stats) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(KL, log Σ exp z, log Σ exp y), [N] each."""
    peak, mass, weighted, ref_peak, ref_mass = (x[:, 0] for x in stats)
    log_z, ref_log_z = peak + jnp.log(mass), ref_peak + jnp.log(ref_mass)
    return jnp.maximum(weighted / mass - log_z + ref_log_z, 0.0), log_z, ref_log_z


def squash(raw: jax.Array, softcap: float | None, temperature: float) -> tuple[jax.Array, jax.Array | float]:
    """Logits from hidden @ weightᵀ + bias, and their slope: (z, dz/draw)."""
    if softcap is None:
        return raw / temperature, 1.0 / temperature
    bent = jnp.tanh(raw / softcap)
    return (softcap / temperature) * bent, (1.0 - bent**2) / temperature


def gradient(options, raw, ref_raw, row, fresh):
    """The gradient with respect to raw = hidden @ weightᵀ + bias; 0 where not `fresh`."""
    z, slope = squash(raw, options.softcap, options.temperature)
    y, _ = squash(ref_raw, options.ref_softcap, options.temperature)
    log_p, log_q = z - row.log_z, y - row.ref_log_z
    return jnp.where(fresh, row.cotangent * jnp.exp(log_p) * (log_p - log_q - row.kl) * slope, 0.0)
