"""The memory-bounded implementation of `ops/logprobs.py`: one tile [N, chunk] of logits at a time, on any platform.

Forward: an online log-sum-exp over the tiles. Backward computes each tile again. With p = softmax(z), H the entropy and
g the gradients with respect to logps, entropy, log_normalizer and mean_logit,

    dz = g_logps (onehot - p) - g_entropy p (log p + H) + g_log_normalizer p + g_mean_logit / V

then through temperature and soft-cap to the raw logits, dhidden += draw W_tile and dW_tile = drawᵀ hidden.

Memory besides inputs and gradients: one tile in float32 with a few elementwise copies of it, and dhidden in float32.

Most tokens where the mask is False (prompts, padding) get no logits, if one device sees all tokens: the others move to
the front, and the tiles are as tall as a quarter, a half, three quarters or all of the rows, the least that holds them.
Shapes are static, so each height is a program of its own, and the count picks one.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.ops.logits import largest
from jaxalign.types import Unembedding

TILE_LOGITS = 2**22  # 16 MiB in float32
HEIGHTS, WORTH_A_CHOICE = 4, 2**20  # parts of the tokens; number of logits below which all are computed


class _Options(NamedTuple):
    softcap: float | None
    temperature: float
    wanted: tuple[str, ...]
    chunk: int | None  # None: `default_chunk` of the height
    heights: tuple[int, ...]  # numbers of rows, one of which is computed


class _Stats(NamedTuple):
    """Statistics of the tiles seen so far, [N] each."""

    peak: jax.Array  # largest logit
    mass: jax.Array  # Σ exp(z - peak)
    weighted: jax.Array  # Σ exp(z - peak) (z - peak)
    total: jax.Array  # Σ z
    chosen: jax.Array  # z of the target
    best: jax.Array  # id of the largest logit, the lowest such id


def default_chunk(tokens: int, vocabulary: int) -> int:
    """Columns of a tile: tokens x chunk ~ 4M logits, a multiple of 128 between 512 and the vocabulary."""
    columns = max(512, TILE_LOGITS // max(tokens, 1) // 128 * 128)
    return min(columns, vocabulary)


def token_logps(
    hidden: jax.Array,
    unembedding: Unembedding,
    targets: jax.Array,
    *,
    mask: jax.Array | None = None,
    temperature: float,
    wanted: tuple[str, ...],
    chunk: int | None,
) -> dict[str, jax.Array]:
    """logps and the `wanted` extras of hidden [N D], one value per token; undefined where the mask is False."""
    (vocabulary, _), rows = unembedding.weight.shape, len(targets)
    bias = unembedding.bias
    bias = None if bias is None else bias.astype(jnp.float32)
    heights = (rows,)
    if mask is not None and rows * vocabulary >= WORTH_A_CHOICE:
        heights = tuple(sorted({-(-rows * part // HEIGHTS) for part in range(1, HEIGHTS + 1)}))
    options = _Options(unembedding.softcap, temperature, wanted, chunk, heights)
    if len(heights) == 1:
        return _logps(options, hidden, unembedding.weight, bias, targets, jnp.int32(0))
    order = jnp.argsort(~mask, stable=True)  # tokens that count first
    which = jnp.searchsorted(jnp.array(heights), jnp.sum(mask))
    hidden, targets = (x.at[order].get(unique_indices=True) for x in (hidden, targets))
    values = _logps(options, hidden, unembedding.weight, bias, targets, which)
    return {name: jnp.zeros_like(value).at[order].set(value, unique_indices=True) for name, value in values.items()}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logps(
    options: _Options,
    hidden: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    targets: jax.Array,
    which: jax.Array,
) -> dict[str, jax.Array]:
    """logps and extras of the first options.heights[which] rows; 0 in the others."""
    return _forward(options, hidden, weight, bias, targets, which)[0]


def _forward(options: _Options, hidden: jax.Array, weight: jax.Array, bias: Any, targets: jax.Array, which: jax.Array):
    rows = len(hidden)

    def of_first(height: int, hidden: jax.Array, targets: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        return jax.tree.map(lambda x: _tall(x, rows), _values(options, hidden[:height], weight, bias, targets[:height]))

    branches = [functools.partial(of_first, height) for height in options.heights]
    values, log_normalizer = jax.lax.switch(which, branches, hidden, targets)
    return values, (hidden, weight, bias, targets, which, log_normalizer, values.get("entropy"))


def _backward(options: _Options, residuals: tuple, gradients: dict[str, jax.Array]):
    hidden, weight, bias, targets, which, log_normalizer, entropy = residuals
    gradients = {name: g for name, g in gradients.items() if name != "correct"}

    def of_first(height: int, *rows: Any) -> tuple:
        d_hidden, d_weight, d_bias = _gradients(options, weight, bias, *jax.tree.map(lambda x: x[:height], rows))
        return _tall(d_hidden, len(hidden)), d_weight, d_bias

    branches = [functools.partial(of_first, height) for height in options.heights]
    cotangents = jax.lax.switch(which, branches, hidden, targets, log_normalizer, entropy, gradients)
    return *cotangents, None, None


_logps.defvjp(_forward, _backward)


def _tall(x: jax.Array, rows: int) -> jax.Array:
    return jnp.pad(x, ((0, rows - len(x)), *((0, 0),) * (x.ndim - 1)))


def _values(
    options: _Options, hidden: jax.Array, weight: jax.Array, bias: jax.Array | None, targets: jax.Array
) -> tuple[dict[str, jax.Array], jax.Array]:
    """(logps and the wanted extras, log Σ exp z) of all rows."""
    vocabulary, rows = weight.shape[0], hidden.shape[0]
    chunk = _chunk(options, rows, vocabulary)

    def see(stats: _Stats, i: jax.Array) -> tuple[_Stats, None]:
        z, _, ids, fresh = logits_tile(options, chunk, hidden, weight, bias, i)
        seen = jnp.where(fresh, z, -jnp.inf)
        top = jnp.max(seen, axis=1)
        peak = jnp.maximum(stats.peak, top)
        shifted = seen - peak[:, None]
        mass, old = jnp.exp(shifted), jnp.exp(stats.peak - peak)
        sums = {"mass": stats.mass * old + jnp.sum(mass, axis=1)}
        if "entropy" in options.wanted:
            # Σ exp(z - new) (z - new) of the old tiles, from what they summed to against the old peak
            moved = stats.weighted + jnp.where(stats.mass > 0, (stats.peak - peak) * stats.mass, 0.0)
            sums["weighted"] = moved * old + jnp.sum(jnp.where(fresh, mass * shifted, 0.0), axis=1)
        if "mean_logit" in options.wanted:
            sums["total"] = stats.total + jnp.sum(jnp.where(fresh, z, 0.0), axis=1)
        if "correct" in options.wanted:
            sums["best"] = jnp.where(top > stats.peak, ids[largest(seen)], stats.best)
        hit = fresh & (ids[None, :] == targets[:, None])
        chosen = stats.chosen + jnp.sum(jnp.where(hit, z, 0.0), axis=1)
        return stats._replace(peak=peak, chosen=chosen, **sums), None

    zeros = jnp.zeros(rows, jnp.float32)
    start = _Stats(jnp.full(rows, -jnp.inf), zeros, zeros, zeros, zeros, jnp.zeros(rows, jnp.int32))
    stats, _ = jax.lax.scan(see, start, jnp.arange(_tiles(vocabulary, chunk)))
    log_normalizer = stats.peak + jnp.log(stats.mass)
    values = {
        "logps": stats.chosen - log_normalizer,
        "entropy": jnp.log(stats.mass) - stats.weighted / stats.mass,
        "log_normalizer": log_normalizer,
        "mean_logit": stats.total / vocabulary,
        "correct": stats.best == targets,
    }
    return {name: values[name] for name in ("logps", *options.wanted)}, log_normalizer


def _gradients(
    options: _Options,
    weight: jax.Array,
    bias: jax.Array | None,
    hidden: jax.Array,
    targets: jax.Array,
    log_normalizer: jax.Array,
    entropy: jax.Array | None,
    gradients: dict[str, jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """(dhidden, dweight, dbias) of all rows."""
    vocabulary = weight.shape[0]
    chunk = _chunk(options, len(hidden), vocabulary)
    column = {name: g[:, None] for name, g in gradients.items()}

    def back(carry: tuple, i: jax.Array) -> tuple[tuple, None]:
        d_hidden, d_weight, d_bias = carry
        z, slope, ids, fresh = logits_tile(options, chunk, hidden, weight, bias, i)
        log_p = z - log_normalizer[:, None]
        p = jnp.exp(log_p)
        scale = -column["logps"] + column.get("log_normalizer", 0.0)
        if entropy is not None:
            scale = scale - column["entropy"] * (log_p + entropy[:, None])
        dz = scale * p + jnp.where(ids[None, :] == targets[:, None], column["logps"], 0.0)
        if "mean_logit" in column:
            dz = dz + column["mean_logit"] / vocabulary
        d_raw = jnp.where(fresh, dz * slope, 0.0)
        start = _start(vocabulary, chunk, i)
        narrow = d_raw.astype(hidden.dtype)
        tile = _columns(weight, start, chunk).astype(hidden.dtype)
        d_hidden += jnp.einsum("nc,cd->nd", narrow, tile, preferred_element_type=jnp.float32)
        d_tile = jnp.einsum("nc,nd->cd", narrow, hidden, preferred_element_type=jnp.float32)
        d_weight = _add_columns(d_weight, d_tile, start)
        d_bias = None if d_bias is None else _add_columns(d_bias, jnp.sum(d_raw, axis=0), start)
        return (d_hidden, d_weight, d_bias), None

    zeros = (
        jnp.zeros(hidden.shape, jnp.float32),
        jnp.zeros_like(weight),
        None if bias is None else jnp.zeros_like(bias),
    )
    (d_hidden, d_weight, d_bias), _ = jax.lax.scan(back, zeros, jnp.arange(_tiles(vocabulary, chunk)))
    return d_hidden.astype(hidden.dtype), d_weight, d_bias


def _chunk(options: _Options, rows: int, vocabulary: int) -> int:
    return min(options.chunk or default_chunk(rows, vocabulary), vocabulary)


def logits_tile(
    options: _Options, chunk: int, hidden: jax.Array, weight: jax.Array, bias: jax.Array | None, i: jax.Array
) -> tuple:
    """(z, dz/draw, ids, fresh) of tile i. The last tile is moved back to end at V; `fresh` is False on its overlap."""
    start = _start(weight.shape[0], chunk, i)
    ids = start + jnp.arange(chunk)
    columns = _columns(weight, start, chunk).astype(hidden.dtype)
    raw = jnp.einsum("nd,cd->nc", hidden, columns, preferred_element_type=jnp.float32)
    if bias is not None:
        raw = raw + _columns(bias, start, chunk)[None, :]
    slope = 1.0 / options.temperature
    if options.softcap is not None:
        squashed = jnp.tanh(raw / options.softcap)
        raw, slope = options.softcap * squashed, (1.0 - squashed**2) * slope
    return raw / options.temperature, slope, ids, (ids >= i * chunk)[None, :]


def _tiles(vocabulary: int, chunk: int) -> int:
    return -(-vocabulary // chunk)


def _start(vocabulary: int, chunk: int, i: jax.Array) -> jax.Array:
    return jnp.minimum(i * chunk, vocabulary - chunk)


def _columns(x: jax.Array, start: jax.Array, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size)


def _add_columns(x: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
    """x with `part` added from `start` on; the part is zero where the last tile overlaps the one before."""
    summed = _columns(x, start, part.shape[0]) + part.astype(x.dtype)
    return jax.lax.dynamic_update_slice_in_dim(x, summed, start, 0)
