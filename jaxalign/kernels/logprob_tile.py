"""The mathematics of one tile of logits, shared by the TPU and the GPU body of `logprob.py`.

Plain values in, plain values out: rows [n, 1], columns [1, c], tiles [n, c], everything float32.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Options(NamedTuple):
    """Static settings of the kernels; the last three are extras to compute."""

    softcap: float | None = None
    temperature: float = 1.0
    entropy: bool = False
    mean_logit: bool = False
    correct: bool = False


class Statistics(NamedTuple):
    """Statistics of the logits seen so far, one value per token; extras that are not computed keep their start."""

    peak: jax.Array  # max z
    mass: jax.Array  # Σ exp(z - peak)
    weighted: jax.Array  # Σ exp(z - peak) (z - peak)
    total: jax.Array  # Σ z
    chosen: jax.Array  # z of the target; 0 before it was seen
    best: jax.Array  # id of the largest logit, the lowest such id; exact in float32 below 2**24


class Slopes(NamedTuple):
    """Coefficients of a token in the backward pass: dz = (scale - entropy * log p) p + onehot logps + mean_logit."""

    log_normalizer: jax.Array
    scale: jax.Array  # -g_logps + g_log_normalizer - g_entropy H
    entropy: jax.Array  # g_entropy
    logps: jax.Array  # g_logps
    mean_logit: jax.Array  # g_mean_logit / V


LOWEST = -1e30  # below every logit; unlike -inf it can be subtracted from itself


def start(shape: tuple[int, ...]) -> Statistics:
    """Statistics before any logit."""
    zeros = jnp.zeros(shape, jnp.float32)
    return Statistics(jnp.full(shape, LOWEST, jnp.float32), zeros, zeros, zeros, zeros, zeros)


def merge(parts: Statistics) -> Statistics:
    """[parts, N] -> [N]: statistics of all logits from those of disjoint parts."""
    peak = jnp.max(parts.peak, axis=0)
    lower = parts.peak - peak[None, :]
    scale = jnp.exp(lower)
    best = jnp.min(jnp.where(lower == 0, parts.best, float(2**24)), axis=0)
    return Statistics(
        peak=peak,
        mass=jnp.sum(parts.mass * scale, axis=0),
        weighted=jnp.sum((parts.weighted + lower * parts.mass) * scale, axis=0),
        total=jnp.sum(parts.total, axis=0),
        chosen=jnp.sum(parts.chosen, axis=0),
        best=best,
    )


def logits(raw: jax.Array, bias: jax.Array | None, options: Options) -> tuple[jax.Array, jax.Array | None]:
    """(z, dz/draw) from raw = h Wᵀ; without a soft-cap the slope is the constant 1 / temperature: None."""
    if bias is not None:
        raw = raw + bias
    if options.softcap is None:
        return raw * (1.0 / options.temperature), None
    squashed = jnp.tanh(raw * (1.0 / options.softcap))
    return squashed * (options.softcap / options.temperature), (1.0 - squashed * squashed) * (1.0 / options.temperature)


def see(
    stats: Statistics, z: jax.Array, ids: jax.Array, targets: jax.Array, vocabulary: int, options: Options
) -> Statistics:
    """`stats` after one more tile z of the logits `ids` [n, c]; ids from `vocabulary` on are padding.

    `peak` is the largest of the values that `chosen` is one of, and `mass` is at least exp(0), so chosen - peak <= 0
    and log(mass) >= 0 in float32 too: no log-probability is above 0.
    """
    fresh = ids < vocabulary
    seen = jnp.where(fresh, z, LOWEST)
    top = jnp.max(seen, axis=1, keepdims=True)
    peak = jnp.maximum(stats.peak, top)
    shifted = seen - peak
    mass, old = jnp.where(fresh, jnp.exp(shifted), 0.0), jnp.exp(stats.peak - peak)
    row = functools.partial(jnp.sum, axis=1, keepdims=True)
    weighted, total, best = stats.weighted, stats.total, stats.best
    if options.entropy:
        # Σ exp(z - new) (z - new) of the old tiles, from what they summed to against the old peak
        moved = weighted + jnp.where(stats.mass > 0, (stats.peak - peak) * stats.mass, 0.0)
        weighted = moved * old + row(mass * jnp.where(fresh, shifted, 0.0))
    if options.mean_logit:
        total = total + row(jnp.where(fresh, z, 0.0))
    if options.correct:
        best_of_tile = jnp.min(jnp.where(seen == top, ids, 2**24), axis=1, keepdims=True).astype(jnp.float32)
        best = jnp.where(top > stats.peak, best_of_tile, best)
    chosen = stats.chosen + row(jnp.where(ids == targets, z, 0.0))
    return Statistics(peak, stats.mass * old + row(mass), weighted, total, chosen, best)


def back(
    z: jax.Array,
    slope: jax.Array | None,
    ids: jax.Array,
    targets: jax.Array,
    slopes: Slopes,
    vocabulary: int,
    options: Options,
) -> jax.Array:
    """dloss/draw of one tile."""
    log_p = z - slopes.log_normalizer
    scale = slopes.scale - slopes.entropy * log_p if options.entropy else slopes.scale
    dz = scale * jnp.exp(log_p) + jnp.where(ids == targets, slopes.logps, 0.0)
    if options.mean_logit:
        dz = dz + slopes.mean_logit
    dz = dz * ((1.0 / options.temperature) if slope is None else slope)
    return jnp.where(ids < vocabulary, dz, 0.0)
