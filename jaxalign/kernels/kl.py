"""KL(π‖π_ref) of every token over the whole vocabulary, from hidden states or logits, without [N, V] in memory.

With z the policy's logits, y the reference's, p = softmax(z) and q = softmax(y),

    KL = Σ p (log p - log q) = Σ p (z - y) - log Σ exp z + log Σ exp y

Forward: the statistics of tiles of the vocabulary merge as in an online log-sum-exp (`Stats` and `merge` in
kl_tile.py). A kernel computes a tile of z and one of y in float32, on the chip, and merges it into the row's Stats.
Backward, with the cotangent g of a row: a kernel computes

    dz = g p (log p - log q - KL)

for one slab of the vocabulary after the other, and two matrix products of XLA take it to dhidden and dweight. One dz
for both costs 4 matrix products; two kernels that each accumulate one of them in VMEM would compute z and y twice, 6.
And no program holds an accumulator as wide as D, for which a GPU has too few registers.

The reference is frozen: neither it nor its logits have a gradient.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from jaxalign.kernels import kl_gpu, kl_tpu
from jaxalign.kernels.front import on_first, tall
from jaxalign.kernels.kl_tile import Options, Row, empty, finish, gradient, merge, of_tile, squash
from jaxalign.kernels.products import times
from jaxalign.kernels.runtime import Target
from jaxalign.types import Unembedding

XLA = Target("cpu", 0)
SLAB_ELEMENTS = 2**26  # of dz, 128 MiB in bfloat16


def kl_reference(logits: Float[Array, "N V"], ref_logits: Float[Array, "N V"]) -> Float[Array, "N"]:
    """Σ p (log p - log q): the definition. A value that rounding has made negative is returned as 0."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    log_q = jax.nn.log_softmax(jax.lax.stop_gradient(ref_logits).astype(jnp.float32), axis=-1)
    value = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    # where(value < 0, 0, value) would have no gradient just where policy and reference agree
    return value + jax.lax.stop_gradient(jnp.maximum(-value, 0.0))


def kl(
    hidden: Float[Array, "N D"],
    unembedding: Unembedding,
    ref_hidden: Float[Array, "N R"],
    ref_unembedding: Unembedding,
    count: Int[Array, ""],
    *,
    temperature: float = 1.0,
    chunk: int | None = None,
    target: Target = XLA,
) -> Float[Array, "N"]:
    """KL(π‖π_ref) in nats of the first `count` rows; 0, and no gradient, after them.

    Args:
      hidden: the policy's hidden states; D and R may differ.
      unembedding: the policy's unembedding; V must not differ.
      ref_hidden: the reference's hidden states.
      ref_unembedding: the reference's unembedding.
      count: number of rows that count. Kernels skip the others, XLA most of them.
      temperature: divisor of both logits.
      chunk: columns of the vocabulary at a time; by default about 4M logits in XLA, 64M in the kernels' backward.
      target: the chip whose kernel runs; `XLA` is the implementation in XLA, on any platform.
    """
    options = Options(unembedding.softcap, ref_unembedding.softcap, temperature, chunk, target, None)
    bias, ref_bias = unembedding.bias, ref_unembedding.bias
    frozen = jax.lax.stop_gradient((ref_hidden, ref_unembedding.weight, ref_bias, count))
    return _kl(options, hidden, unembedding.weight, bias, *frozen)


def kl_of_logits(
    logits: Float[Array, "N V"], ref_logits: Float[Array, "N V"], *, chunk: int | None = None, target: Target = XLA
) -> Float[Array, "N"]:
    """KL(π‖π_ref) in nats of given logits, which are read once; their gradient is the only other array of that size."""
    chunk = min(chunk or max(512, 2**22 // max(logits.shape[0], 1) // 512 * 512), logits.shape[1])
    options = Options(None, None, 1.0, chunk, target, None)
    return _kl_of_logits(options, logits, jax.lax.stop_gradient(ref_logits))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kl(options, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, count):
    return forward(options, (hidden, weight, bias, ref_hidden, ref_weight, ref_bias), count)[0]


def _forward(options, *arguments):
    sides, count = arguments[:-1], arguments[-1]
    row = forward(options, sides, count)
    return row[0], (sides, count, row)


def _backward(options, residuals, cotangent):
    sides, count, row = residuals
    weight, bias = sides[1:3]
    d_hidden, d_weight, d_bias = backward(options, sides, count, row, cotangent, weight_dtype=weight.dtype)
    return d_hidden, d_weight, None if bias is None else d_bias.astype(bias.dtype), None, None, None, None


_kl.defvjp(_forward, _backward)


def forward(options: Options, sides: tuple, count: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(KL, log Σ exp z, log Σ exp y), [N] each, 0 after the first `count` rows.

    Args:
      options: static settings; with an axis V is cut over it, in a surrounding shard_map.
      sides: hidden [N D], weight [V D], bias [V] or None, and the same of the reference.
      count: number of rows that count.
    """
    options = _with_chunk(options, sides)
    stats = {"cpu": _xla_stats, "tpu": kl_tpu.stats, "gpu": kl_gpu.stats}[options.target.body](
        options, _wide_biases(sides), count
    )
    if options.axis is not None:
        parts = jax.lax.all_gather(stats, options.axis)
        stats = functools.reduce(merge, [jax.tree.map(lambda x, i=i: x[i], parts) for i in range(parts.peak.shape[0])])
    counts = jnp.arange(len(sides[0])) < count
    value, log_z, ref_log_z = (jnp.where(counts, x, 0.0) for x in finish(stats))
    return value, log_z, ref_log_z


def backward(
    options: Options, sides: tuple, count: jax.Array, values: tuple, cotangent: jax.Array, *, weight_dtype: Any
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """(dhidden, dweight, dbias) from the values of `forward`; of a shard of V, the contributions of its logits."""
    options, sides = _with_chunk(options, sides), _wide_biases(sides)
    value, log_z, ref_log_z = values
    cotangent = jnp.where(jnp.arange(len(cotangent)) < count, cotangent, 0.0)
    row = Row(*(x[:, None] for x in (log_z, ref_log_z, value, cotangent)))
    of_first = functools.partial(_gradients, options, sides, count, weight_dtype)
    of_rows = sides[0], sides[3], row
    if options.target.body != "cpu":
        return of_first(len(cotangent), *of_rows)
    return on_first(of_first, count, sides[1].shape[0], *of_rows)


def _gradients(options, sides, count, weight_dtype, height, hidden, ref_hidden, row):
    rows, (vocabulary, _), size = len(hidden), sides[1].shape, options.chunk
    hidden, ref_hidden, row = jax.tree.map(lambda x: x[:height], (hidden, ref_hidden, row))
    weight, bias = sides[1:3]
    sides = hidden, weight, bias, ref_hidden, *sides[4:]
    make = {"cpu": _xla_dz, "tpu": kl_tpu.dz, "gpu": kl_gpu.dz}[options.target.body]

    def back(carry, i):
        d_hidden, d_weight, d_bias = carry
        start = jnp.minimum(i * size, vocabulary - size)  # the last slab ends at V, and overlaps the one before
        slab = _slab(sides, start, size)
        dz = make(options, slab, row, count, i * size - start)
        d_hidden += times("nc,cd->nd", dz, slab[1].astype(dz.dtype))
        d_slab = times("nc,nd->cd", dz, hidden)
        d_weight = _add(d_weight, d_slab, start)
        d_bias = None if bias is None else _add(d_bias, jnp.sum(dz, axis=0, dtype=jnp.float32), start)
        return (d_hidden, d_weight, d_bias), None

    zeros = (
        jnp.zeros(hidden.shape, jnp.float32),
        jnp.zeros(weight.shape, weight_dtype),
        None if bias is None else jnp.zeros_like(bias),
    )
    (d_hidden, d_weight, d_bias), _ = jax.lax.scan(back, zeros, jnp.arange(pl.cdiv(vocabulary, size)))
    return tall(d_hidden.astype(hidden.dtype), rows), d_weight, d_bias


def _with_chunk(options: Options, sides: tuple) -> Options:
    """The options with the columns of a tile, or of a slab of a kernel's backward, of these rows and this shard."""
    largest = 2**22 if options.target.body == "cpu" else SLAB_ELEMENTS
    chunk = options.chunk or max(512, largest // max(len(sides[0]), 1) // 512 * 512)
    return options._replace(chunk=min(chunk, sides[1].shape[0]))


def _wide_biases(sides: tuple) -> tuple:
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias = sides
    bias, ref_bias = (None if x is None else x.astype(jnp.float32) for x in (bias, ref_bias))
    return hidden, weight, bias, ref_hidden, ref_weight, ref_bias


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kl_of_logits(options, logits, ref_logits):
    return _forward_of_logits(options, logits, ref_logits)[0]


def _forward_of_logits(options, logits, ref_logits):
    make = {"cpu": _xla_logits, "tpu": kl_tpu.logits_stats, "gpu": kl_gpu.logits_stats}[options.target.body]
    stats = make(options, logits, ref_logits)
    value, log_z, ref_log_z = finish(stats)
    return value, (logits, ref_logits, value, log_z, ref_log_z)


def _backward_of_logits(options, residuals, cotangent):
    """The gradient, elementwise: XLA computes it in one pass without a kernel."""
    logits, ref_logits, value, log_z, ref_log_z = residuals
    row = Row(*(x[:, None] for x in (log_z, ref_log_z, value, cotangent)))
    dz = gradient(options, logits.astype(jnp.float32), ref_logits.astype(jnp.float32), row, True)
    return dz.astype(logits.dtype), None


_kl_of_logits.defvjp(_forward_of_logits, _backward_of_logits)


def _slab(sides: tuple, start: jax.Array, size: int) -> tuple:
    """The sides with `size` rows of weights and biases, from `start` on."""
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias = sides
    of_vocabulary = weight, bias, ref_weight, ref_bias
    weight, bias, ref_weight, ref_bias = (
        None if x is None else jax.lax.dynamic_slice_in_dim(x, start, size) for x in of_vocabulary
    )
    return hidden, weight, bias, ref_hidden, ref_weight, ref_bias


def _add(x: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
    """x with `part` added from row `start` on; the part is zero where slabs overlap."""
    summed = jax.lax.dynamic_slice_in_dim(x, start, part.shape[0]) + part.astype(x.dtype)
    return jax.lax.dynamic_update_slice_in_dim(x, summed, start, 0)


# XLA: one tile [N, chunk] of each logits at a time, on any platform.


def _raw(hidden: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
    raw = times("nd,vd->nv", hidden, weight.astype(hidden.dtype))
    return raw if bias is None else raw + bias[None, :]


def _xla_stats(options, sides, count):
    (rows, _), (vocabulary, _), size = sides[0].shape, sides[1].shape, options.chunk

    def of_first(height, hidden, ref_hidden):
        first = hidden[:height], *sides[1:3], ref_hidden[:height], *sides[4:]

        def see(stats, i):
            start = jnp.minimum(i * size, vocabulary - size)
            hidden, weight, bias, ref_hidden, ref_weight, ref_bias = _slab(first, start, size)
            z, _ = squash(_raw(hidden, weight, bias), options.softcap, options.temperature)
            y, _ = squash(_raw(ref_hidden, ref_weight, ref_bias), options.ref_softcap, options.temperature)
            fresh = (jnp.arange(size) >= i * size - start)[None, :]
            return merge(stats, of_tile(z, y, fresh)), None

        stats = jax.lax.scan(see, empty(height), jnp.arange(pl.cdiv(vocabulary, size)))[0]
        return jax.tree.map(lambda x: tall(x, rows), stats)

    return on_first(of_first, count, vocabulary, sides[0], sides[3])


def _xla_logits(options, logits, ref_logits):
    vocabulary, size = logits.shape[1], options.chunk

    def see(stats, i):
        start = jnp.minimum(i * size, vocabulary - size)
        z, y = (jax.lax.dynamic_slice_in_dim(x, start, size, 1).astype(jnp.float32) for x in (logits, ref_logits))
        return merge(stats, of_tile(z, y, (jnp.arange(size) >= i * size - start)[None, :])), None

    return jax.lax.scan(see, empty(logits.shape[0]), jnp.arange(pl.cdiv(vocabulary, size)))[0]


def _xla_dz(options, slab, row, count, first):
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias = slab
    raw, ref_raw = _raw(hidden, weight, bias), _raw(ref_hidden, ref_weight, ref_bias)
    fresh = (jnp.arange(weight.shape[0]) >= first)[None, :]
    return gradient(options, raw, ref_raw, row, fresh).astype(hidden.dtype)
