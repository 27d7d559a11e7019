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

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from jaxalign.kernels import kl_gpu, kl_tpu
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
    axis: str | None = None,
) -> Float[Array, "N"]:
    """KL(π‖π_ref) in nats of the first `count` rows; 0, and no gradient, after them.

    Args:
      hidden: the policy's hidden states; D and R may differ.
      unembedding: the policy's unembedding; V must not differ.
      ref_hidden: the reference's hidden states.
      ref_unembedding: the reference's unembedding.
      count: number of rows that count. Kernels skip the others; XLA computes them and drops the result.
      temperature: divisor of both logits.
      chunk: columns of the vocabulary at a time; by default about 4M logits in XLA, 64M in the kernels' backward.
      target: the chip whose kernel runs; `XLA` is the implementation in XLA, on any platform.
      axis: the mesh axis of a surrounding shard_map whose devices hold consecutive parts of both vocabularies.
    """
    rows, vocabulary = hidden.shape[0], unembedding.weight.shape[0]
    largest = 2**22 if target.body == "cpu" else SLAB_ELEMENTS
    chunk = min(chunk or max(512, largest // max(rows, 1) // 512 * 512), vocabulary)
    options = Options(unembedding.softcap, ref_unembedding.softcap, temperature, chunk, target, axis)
    bias, ref_bias = (None if u.bias is None else u.bias.astype(jnp.float32) for u in (unembedding, ref_unembedding))
    frozen = ref_hidden, ref_unembedding.weight, ref_bias, count
    return _kl(options, hidden, unembedding.weight, bias, *jax.lax.stop_gradient(frozen))


def kl_of_logits(
    logits: Float[Array, "N V"], ref_logits: Float[Array, "N V"], *, chunk: int | None = None, target: Target = XLA
) -> Float[Array, "N"]:
    """KL(π‖π_ref) in nats of given logits, which are read once; their gradient is the only other array of that size."""
    chunk = min(chunk or max(512, 2**22 // max(logits.shape[0], 1) // 512 * 512), logits.shape[1])
    options = Options(None, None, 1.0, chunk, target, None)
    return _kl_of_logits(options, logits, jax.lax.stop_gradient(ref_logits))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kl(options, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, count):
    return _forward(options, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, count)[0]


def _forward(options, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, count):
    sides = hidden, weight, bias, ref_hidden, ref_weight, ref_bias
    stats = {"cpu": _xla_stats, "tpu": kl_tpu.stats, "gpu": kl_gpu.stats}[options.target.body](options, sides, count)
    if options.axis is not None:
        parts = jax.lax.all_gather(stats, options.axis)
        stats = functools.reduce(merge, [jax.tree.map(lambda x, i=i: x[i], parts) for i in range(parts.peak.shape[0])])
    value, log_z, ref_log_z = finish(stats)
    counts = jnp.arange(hidden.shape[0]) < count
    return jnp.where(counts, value, 0.0), (sides, count, value, log_z, ref_log_z)


def _backward(options, residuals, cotangent):
    sides, count, value, log_z, ref_log_z = residuals
    hidden, weight, bias = sides[:3]
    if options.axis is not None:
        # every device of the axis returned the same KL; shard_map gave each its share of the cotangent
        cotangent = jax.lax.psum(cotangent, options.axis)
    counts = jnp.arange(hidden.shape[0]) < count
    row = Row(*(jnp.where(counts, x, 0.0)[:, None] for x in (log_z, ref_log_z, value, cotangent)))
    make = {"cpu": _xla_dz, "tpu": kl_tpu.dz, "gpu": kl_gpu.dz}[options.target.body]
    vocabulary, size = weight.shape[0], options.chunk

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

    zeros = jnp.zeros(hidden.shape, jnp.float32), jnp.zeros_like(weight), None if bias is None else jnp.zeros_like(bias)
    (d_hidden, d_weight, d_bias), _ = jax.lax.scan(back, zeros, jnp.arange(pl.cdiv(vocabulary, size)))
    return d_hidden.astype(hidden.dtype), d_weight, d_bias, None, None, None, None


_kl.defvjp(_forward, _backward)


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
    rows, vocabulary, size = sides[0].shape[0], sides[1].shape[0], options.chunk

    def see(stats, i):
        start = jnp.minimum(i * size, vocabulary - size)
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias = _slab(sides, start, size)
        z, _ = squash(_raw(hidden, weight, bias), options.softcap, options.temperature)
        y, _ = squash(_raw(ref_hidden, ref_weight, ref_bias), options.ref_softcap, options.temperature)
        fresh = (jnp.arange(size) >= i * size - start)[None, :]
        return merge(stats, of_tile(z, y, fresh)), None

    return jax.lax.scan(see, empty(rows), jnp.arange(pl.cdiv(vocabulary, size)))[0]


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
