"""The memory-bounded implementation of `ops/logprobs.py`: one tile [N, chunk] of logits at a time, on any platform.

Forward: an online log-sum-exp over the tiles. Backward computes each tile again. With p = softmax(z), H the entropy and
g the gradients with respect to logps, entropy, log_normalizer and mean_logit,

    dz = g_logps (onehot - p) - g_entropy p (log p + H) + g_log_normalizer p + g_mean_logit / V

then through temperature and soft-cap to the raw logits, dhidden += draw W_tile and dW_tile = drawᵀ hidden.

Memory besides inputs and gradients: one tile in float32 with a few elementwise copies of it, and dhidden in float32.

Most tokens where the mask is False (prompts, padding) get no logits: the others move to the front of a device's rows,
and the tiles are as tall as a part of the rows that holds them (`kernels/front.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.kernels import front
from jaxalign.kernels.logprob_tile import Statistics, merge, start
from jaxalign.kernels.products import times
from jaxalign.ops.logits import largest

TILE_LOGITS = 2**22  # 16 MiB in float32


class Chunked(NamedTuple):
    """Static settings of the computation, on one device or as the body of `logprobs_sharded.token_logps`."""

    softcap: float | None
    temperature: float
    wanted: tuple[str, ...]
    chunk: int | None  # None: `default_chunk` of the number of rows
    skips: bool  # most tokens where the mask is False get no logits

    def forward(
        self,
        hidden: jax.Array,
        weight: jax.Array,
        bias: jax.Array | None,
        targets: jax.Array,
        mask: jax.Array,
        *,
        axis: str | None = None,
    ) -> tuple[dict[str, jax.Array], tuple]:
        """(logps and the wanted extras, residuals of `backward`)

        Args:
          hidden: [N D].
          weight: [V D]; V may be cut over the mapped axis `axis`.
          bias: [V] or None.
          targets: Int32[N], ids of the whole vocabulary.
          mask: Bool[N]; elsewhere the values are undefined.
        """
        front_rows, first = _Front.of(self, weight, mask), _first(weight, axis)

        def of_first(height: int, hidden: jax.Array, targets: jax.Array) -> Statistics:
            stats = _statistics(self, hidden[:height], weight, bias, targets[:height])
            return jax.tree.map(lambda x: front.tall(x, len(mask)), stats)

        stats = front_rows.run(of_first, front_rows.move(hidden), front_rows.move(targets - first))
        stats = Statistics(*map(front_rows.back, stats))
        vocabulary = weight.shape[0]
        if axis is not None:
            stats = stats._replace(best=stats.best + first)
            stats = merge(Statistics(*jnp.moveaxis(jax.lax.all_gather(jnp.stack(stats), axis), 1, 0)))
            vocabulary *= jax.lax.axis_size(axis)
        log_normalizer = stats.peak + jnp.log(stats.mass)
        values = {
            "logps": stats.chosen - log_normalizer,
            "entropy": jnp.log(stats.mass) - stats.weighted / stats.mass,
            "log_normalizer": log_normalizer,
            "mean_logit": stats.total / vocabulary,
            "correct": stats.best == targets,
        }
        values = {name: values[name] for name in ("logps", *self.wanted)}
        return values, (log_normalizer, values.get("entropy"))

    def backward(
        self,
        hidden: jax.Array,
        weight: jax.Array,
        bias: jax.Array | None,
        targets: jax.Array,
        mask: jax.Array,
        saved: tuple,
        gradients: dict[str, jax.Array],
        *,
        axis: str | None = None,
        weight_dtype: Any = jnp.float32,
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """(dhidden, dweight, dbias); of a shard of V, the contributions of its logits."""
        front_rows, first = _Front.of(self, weight, mask), _first(weight, axis)
        vocabulary = weight.shape[0] * (1 if axis is None else jax.lax.axis_size(axis))

        def of_first(height: int, *rows: Any) -> tuple:
            cut = jax.tree.map(lambda x: x[:height], rows)
            d_hidden, d_weight, d_bias = _gradients(self, weight, bias, weight_dtype, vocabulary, *cut)
            return front.tall(d_hidden, len(mask)), d_weight, d_bias

        rows = jax.tree.map(front_rows.move, (hidden, targets - first, *saved, gradients))
        d_hidden, d_weight, d_bias = front_rows.run(of_first, *rows)
        return front_rows.back(d_hidden), d_weight, d_bias


class _Front(NamedTuple):
    """The tokens that count, moved before the others."""

    count: jax.Array | None  # their number; None: all, and they stay where they are
    order: jax.Array | None  # Int[N], the token at each place
    vocabulary: int

    @classmethod
    def of(cls, options: Chunked, weight: jax.Array, mask: jax.Array) -> _Front:
        vocabulary = weight.shape[0]
        if not options.skips or len(mask) * vocabulary < front.WORTH_A_CHOICE:
            return cls(None, None, vocabulary)
        return cls(jnp.sum(mask), jnp.argsort(~mask, stable=True), vocabulary)

    def move(self, x: jax.Array) -> jax.Array:
        return x if self.order is None else x.at[self.order].get(unique_indices=True)

    def back(self, x: jax.Array) -> jax.Array:
        return x if self.order is None else jnp.zeros_like(x).at[self.order].set(x, unique_indices=True)

    def run(self, of_first: Callable[..., Any], *rows: Any) -> Any:
        """`of_first` of the number of rows and the rows."""
        return front.on_first(of_first, self.count, self.vocabulary, *rows)


def default_chunk(tokens: int, vocabulary: int) -> int:
    """Columns of a tile: tokens x chunk ~ 4M logits, a multiple of 128 between 512 and the vocabulary."""
    columns = max(512, TILE_LOGITS // max(tokens, 1) // 128 * 128)
    return min(columns, vocabulary)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def token_logps(
    options: Chunked,
    hidden: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    targets: jax.Array,
    mask: jax.Array,
) -> dict[str, jax.Array]:
    """`Chunked.forward` on one device, or as XLA partitions it, with its gradient."""
    return options.forward(hidden, weight, bias, targets, mask)[0]


def _forward(options: Chunked, *inputs: Any) -> tuple:
    values, saved = options.forward(*inputs)
    return values, (inputs, saved)


def _backward(options: Chunked, residuals: tuple, gradients: dict[str, jax.Array]) -> tuple:
    inputs, saved = residuals
    gradients = {name: g for name, g in gradients.items() if name != "correct"}
    _, weight, bias, _, _ = inputs
    d_hidden, d_weight, d_bias = options.backward(*inputs, saved, gradients, weight_dtype=weight.dtype)
    return d_hidden, d_weight, None if bias is None else d_bias.astype(bias.dtype), None, None


token_logps.defvjp(_forward, _backward)


def _first(weight: jax.Array, axis: str | None) -> jax.Array | int:
    """Id of the first logit of this shard of the vocabulary."""
    return 0 if axis is None else jax.lax.axis_index(axis) * weight.shape[0]


def _statistics(
    options: Chunked, hidden: jax.Array, weight: jax.Array, bias: jax.Array | None, targets: jax.Array
) -> Statistics:
    """The statistics of all rows over this shard's logits, [N] each; `best` and `targets` count from its first."""
    vocabulary, rows = weight.shape[0], hidden.shape[0]
    chunk = _chunk(options, rows, vocabulary)

    def see(stats: Statistics, i: jax.Array) -> tuple[Statistics, None]:
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
            sums["best"] = jnp.where(top > stats.peak, ids[largest(seen)].astype(jnp.float32), stats.best)
        hit = fresh & (ids[None, :] == targets[:, None])
        chosen = stats.chosen + jnp.sum(jnp.where(hit, z, 0.0), axis=1)
        return stats._replace(peak=peak, chosen=chosen, **sums), None

    stats, _ = jax.lax.scan(see, start((rows,)), jnp.arange(_tiles(vocabulary, chunk)))
    return stats


def _gradients(
    options: Chunked,
    weight: jax.Array,
    bias: jax.Array | None,
    weight_dtype: Any,
    whole: int,
    hidden: jax.Array,
    targets: jax.Array,
    log_normalizer: jax.Array,
    entropy: jax.Array | None,
    gradients: dict[str, jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """(dhidden, dweight, dbias) of all rows, whose distributions are over `whole` logits, this shard's among them."""
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
            dz = dz + column["mean_logit"] / whole
        d_raw = jnp.where(fresh, dz * slope, 0.0)
        at = _start(vocabulary, chunk, i)
        narrow = d_raw.astype(hidden.dtype)
        tile = _columns(weight, at, chunk).astype(hidden.dtype)
        d_hidden += times("nc,cd->nd", narrow, tile)
        d_tile = times("nc,nd->cd", narrow, hidden)
        d_weight = _add_columns(d_weight, d_tile, at)
        d_bias = None if d_bias is None else _add_columns(d_bias, jnp.sum(d_raw, axis=0), at)
        return (d_hidden, d_weight, d_bias), None

    zeros = (
        jnp.zeros(hidden.shape, jnp.float32),
        jnp.zeros(weight.shape, weight_dtype),
        None if bias is None else jnp.zeros(bias.shape, jnp.float32),
    )
    (d_hidden, d_weight, d_bias), _ = jax.lax.scan(back, zeros, jnp.arange(_tiles(vocabulary, chunk)))
    return d_hidden.astype(hidden.dtype), d_weight, d_bias


def _chunk(options: Chunked, rows: int, vocabulary: int) -> int:
    return min(options.chunk or default_chunk(rows, vocabulary), vocabulary)


def logits_tile(
    options: Chunked, chunk: int, hidden: jax.Array, weight: jax.Array, bias: jax.Array | None, i: jax.Array
) -> tuple:
    """(z, dz/draw, ids, fresh) of tile i. The last tile is moved back to end at V; `fresh` is False on its overlap."""
    at = _start(weight.shape[0], chunk, i)
    ids = at + jnp.arange(chunk)
    columns = _columns(weight, at, chunk).astype(hidden.dtype)
    raw = times("nd,cd->nc", hidden, columns)
    if bias is not None:
        raw = raw + _columns(bias, at, chunk)[None, :]
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
