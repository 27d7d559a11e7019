"""KL(π‖π_ref) of every token over the whole vocabulary, from hidden states or logits, without [N, V] in memory.

With z the policy's logits, y the reference's, p = softmax(z) and q = softmax(y),

    KL = Σ p (log p - log q) = Σ p (z - y) - log Σ exp z + log Σ exp y

Forward: what the tiles of the vocabulary say joins like an online log-sum-exp (`Stats`, `join`). A kernel makes a tile
of z and one of y in float32, on the chip, and adds it to the row's Stats. Backward, in slabs of the vocabulary: with
the cotangent g of a row,

    dz = g p (log p - log q - KL)

is made by a kernel, slab by slab, and two matrix products of XLA take it to dhidden and dweight. Making dz once for
both costs 4 matrix products; two kernels that each accumulate one of them in VMEM would make z and y twice, 6. And no
program holds an accumulator as wide as D, which a GPU's registers could not.

The reference is frozen: nothing has a gradient with respect to it, nor to its logits.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from jaxalign.kernels.runtime import Target, up
from jaxalign.types import Unembedding

LOWEST = -1e30  # stands for -inf as the peak of nothing: exp(LOWEST - LOWEST) is 1, not NaN
ANY = Target("cpu", 0)
SLAB_ELEMENTS = 2**26  # of dz, 128 MiB in bfloat16


class Stats(NamedTuple):
    """Of the logits seen so far, one column a row of tokens. `join` makes them a commutative monoid."""

    peak: jax.Array  # max z
    mass: jax.Array  # Σ exp(z - peak)
    weighted: jax.Array  # Σ exp(z - peak) (z - y)
    ref_peak: jax.Array  # max y
    ref_mass: jax.Array  # Σ exp(y - ref_peak)


class Row(NamedTuple):
    """What the backward knows of a row of tokens, one column each."""

    log_z: jax.Array  # log Σ exp z
    ref_log_z: jax.Array
    kl: jax.Array
    cotangent: jax.Array


class Options(NamedTuple):
    softcap: float | None
    ref_softcap: float | None
    temperature: float
    chunk: int  # columns of a tile of "chunked", or of a slab of the kernel's backward
    target: Target  # body "cpu": no kernel, XLA on any platform
    axis: str | None  # the mesh axis that cuts the vocabulary, inside a shard_map


def kl_reference(logits: Float[Array, "N V"], ref_logits: Float[Array, "N V"]) -> Float[Array, "N"]:
    """Σ p (log p - log q): the definition. Rounding may take it a little below zero; it is kept at 0."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    log_q = jax.nn.log_softmax(jax.lax.stop_gradient(ref_logits).astype(jnp.float32), axis=-1)
    value = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    # a gradient of where(value < 0, 0, value) would be lost just where policy and reference meet
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
    target: Target = ANY,
    axis: str | None = None,
) -> Float[Array, "N"]:
    """KL(π‖π_ref) in nats of the first `count` rows; 0, and no gradient, after them.

    Args:
      hidden: of the policy; D and R may differ.
      unembedding: of the policy; V must not differ.
      ref_hidden: of the reference.
      ref_unembedding: of the reference.
      count: rows that count. Kernels skip the work of the others, XLA does it in vain.
      temperature: both logits are divided by it.
      chunk: columns of the vocabulary at a time: in XLA about 4M logits by default; in the kernels' backward 64M.
      target: the chip whose kernel runs; `ANY` is the implementation in XLA, on any platform.
      axis: the mesh axis of a surrounding shard_map whose devices hold consecutive parts of both vocabularies.
    """
    rows, vocabulary = hidden.shape[0], unembedding.weight.shape[0]
    largest = 2**22 if target.body == "cpu" else SLAB_ELEMENTS
    chunk = min(chunk or max(512, largest // max(rows, 1) // 512 * 512), vocabulary)
    options = Options(unembedding.softcap, ref_unembedding.softcap, temperature, chunk, target, axis)
    bias, ref_bias = (None if u.bias is None else u.bias.astype(jnp.float32) for u in (unembedding, ref_unembedding))
    frozen = ref_hidden, ref_unembedding.weight, ref_bias, count
    return _kl(options, hidden, unembedding.weight, bias, *jax.lax.stop_gradient(frozen))


def empty(rows: int) -> Stats:
    zeros, lowest = jnp.zeros((rows, 1), jnp.float32), jnp.full((rows, 1), LOWEST, jnp.float32)
    return Stats(lowest, zeros, zeros, lowest, zeros)


def of_tile(z: jax.Array, y: jax.Array, fresh: jax.Array) -> Stats:
    """Stats of the columns where `fresh`; what stands in the others may be NaN."""
    difference = jnp.where(fresh, z - y, 0.0)
    z, y = jnp.where(fresh, z, LOWEST), jnp.where(fresh, y, LOWEST)
    peak, ref_peak = jnp.max(z, axis=1, keepdims=True), jnp.max(y, axis=1, keepdims=True)
    mass = jnp.exp(z - peak)
    total = lambda x: jnp.sum(x, axis=1, keepdims=True)  # noqa: E731
    return Stats(peak, total(mass), total(mass * difference), ref_peak, total(jnp.exp(y - ref_peak)))


def join(a: Stats, b: Stats) -> Stats:
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


def times(axes: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """A matrix product in float32; float32 operands are not rounded to bfloat16 or TF32 on their way."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(axes, a, b, precision=exact, preferred_element_type=jnp.float32)


def squash(raw: jax.Array, softcap: float | None, temperature: float) -> tuple[jax.Array, jax.Array | float]:
    """Logits from hidden @ weightᵀ + bias, and their slope: (z, dz/draw)."""
    if softcap is None:
        return raw / temperature, 1.0 / temperature
    bent = jnp.tanh(raw / softcap)
    return (softcap / temperature) * bent, (1.0 - bent**2) / temperature


def kl_of_logits(
    logits: Float[Array, "N V"], ref_logits: Float[Array, "N V"], *, chunk: int | None = None, target: Target = ANY
) -> Float[Array, "N"]:
    """KL(π‖π_ref) in nats of logits that exist: read once, and nothing else as large is made but their gradient."""
    chunk = min(chunk or max(512, 2**22 // max(logits.shape[0], 1) // 512 * 512), logits.shape[1])
    options = Options(None, None, 1.0, chunk, target, None)
    return _kl_of_logits(options, logits, jax.lax.stop_gradient(ref_logits))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kl(options, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, count):
    return _forward(options, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, count)[0]


def _forward(options, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, count):
    sides = hidden, weight, bias, ref_hidden, ref_weight, ref_bias
    stats = {"cpu": _xla_stats, "tpu": _tpu_stats, "gpu": _gpu_stats}[options.target.body](options, sides, count)
    if options.axis is not None:
        parts = jax.lax.all_gather(stats, options.axis)
        stats = functools.reduce(join, [jax.tree.map(lambda x, i=i: x[i], parts) for i in range(parts.peak.shape[0])])
    value, log_z, ref_log_z = finish(stats)
    counts = jnp.arange(hidden.shape[0]) < count
    return jnp.where(counts, value, 0.0), (sides, count, value, log_z, ref_log_z)


def _backward(options, residuals, cotangent):
    sides, count, value, log_z, ref_log_z = residuals
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias = sides
    if options.axis is not None:
        # every device of the axis returned the same KL; shard_map gave each its share of the cotangent
        cotangent = jax.lax.psum(cotangent, options.axis)
    g = jnp.where(jnp.arange(hidden.shape[0]) < count, cotangent, 0.0)
    clean = lambda x: jnp.where(jnp.arange(x.shape[0]) < count, x, 0.0)  # noqa: E731
    row = Row(*(x[:, None] for x in (clean(log_z), clean(ref_log_z), clean(value), g)))
    make = {"cpu": _xla_dz, "tpu": _tpu_dz, "gpu": _gpu_dz}[options.target.body]
    vocabulary, size = weight.shape[0], options.chunk

    def back(carry, i):
        d_hidden, d_weight, d_bias = carry
        start = jnp.minimum(i * size, vocabulary - size)  # the last slab ends at V, and overlaps the one before
        cut = lambda x: None if x is None else jax.lax.dynamic_slice_in_dim(x, start, size)  # noqa: E731
        slab = hidden, cut(weight), cut(bias), ref_hidden, cut(ref_weight), cut(ref_bias)
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
    make = {"cpu": _xla_logits, "tpu": _tpu_logits, "gpu": _gpu_logits}[options.target.body]
    stats = make(options, logits, ref_logits)
    value, log_z, ref_log_z = finish(stats)
    return value, (logits, ref_logits, value, log_z, ref_log_z)


def _backward_of_logits(options, residuals, cotangent):
    """Elementwise, which XLA does in one pass without a kernel."""
    logits, ref_logits, value, log_z, ref_log_z = residuals
    row = Row(*(x[:, None] for x in (log_z, ref_log_z, value, cotangent)))
    dz = _dz(options, logits.astype(jnp.float32), ref_logits.astype(jnp.float32), row, True)
    return dz.astype(logits.dtype), None


_kl_of_logits.defvjp(_forward_of_logits, _backward_of_logits)


def _add(x: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
    """x with `part` added from row `start` on; where slabs overlap the second part is zero."""
    summed = jax.lax.dynamic_slice_in_dim(x, start, part.shape[0]) + part.astype(x.dtype)
    return jax.lax.dynamic_update_slice_in_dim(x, summed, start, 0)


def _dz(options, raw, ref_raw, row, fresh):
    """The gradient with respect to hidden @ weightᵀ + bias."""
    z, slope = squash(raw, options.softcap, options.temperature)
    y, _ = squash(ref_raw, options.ref_softcap, options.temperature)
    log_p, log_q = z - row.log_z, y - row.ref_log_z
    return jnp.where(fresh, row.cotangent * jnp.exp(log_p) * (log_p - log_q - row.kl) * slope, 0.0)


# XLA: one tile [N, chunk] of each logits at a time, on any platform.


def _raw(hidden: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
    raw = times("nd,vd->nv", hidden, weight.astype(hidden.dtype))
    return raw if bias is None else raw + bias[None, :]


def _xla_stats(options, sides, count):
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias = sides
    vocabulary, size = weight.shape[0], options.chunk

    def see(stats, i):
        start = jnp.minimum(i * size, vocabulary - size)
        cut = lambda x: None if x is None else jax.lax.dynamic_slice_in_dim(x, start, size)  # noqa: E731
        z, _ = squash(_raw(hidden, cut(weight), cut(bias)), options.softcap, options.temperature)
        y, _ = squash(_raw(ref_hidden, cut(ref_weight), cut(ref_bias)), options.ref_softcap, options.temperature)
        fresh = (jnp.arange(size) >= i * size - start)[None, :]
        return join(stats, of_tile(z, y, fresh)), None

    return jax.lax.scan(see, empty(hidden.shape[0]), jnp.arange(pl.cdiv(vocabulary, size)))[0]


def _xla_logits(options, logits, ref_logits):
    vocabulary, size = logits.shape[1], options.chunk

    def see(stats, i):
        start = jnp.minimum(i * size, vocabulary - size)
        z, y = (jax.lax.dynamic_slice_in_dim(x, start, size, 1).astype(jnp.float32) for x in (logits, ref_logits))
        return join(stats, of_tile(z, y, (jnp.arange(size) >= i * size - start)[None, :])), None

    return jax.lax.scan(see, empty(logits.shape[0]), jnp.arange(pl.cdiv(vocabulary, size)))[0]


def _xla_dz(options, slab, row, count, first):
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias = slab
    raw, ref_raw = _raw(hidden, weight, bias), _raw(ref_hidden, ref_weight, ref_bias)
    fresh = (jnp.arange(weight.shape[0]) >= first)[None, :]
    return _dz(options, raw, ref_raw, row, fresh).astype(hidden.dtype)


# TPU: a program holds whole rows of hidden states and of the two vocabularies' tiles.
#
# In VMEM, twice for the pipeline: hidden [rows D], ref_hidden [rows R], weight [columns D], ref_weight [columns R]; and
# once about eight float32 tiles [rows columns]. Llama-3 8B in bfloat16: 1024 x 512 on a v5e or v6e, 2 x 24 + 16 of
# 128 MiB, and 512 x 384 on a v5p, 2 x 14 + 6 of 64. Every element of a weight tile that arrives meets `rows` rows: so
# many FLOP a byte, over the 240 of a v5e, the 166 of a v5p and the 560 of a v6e that balance compute and bandwidth.


def _tpu_tile(target: Target, sides) -> tuple[int, int]:
    """The tallest tile, then the widest, within five eighths of VMEM, which leaves the compiler its own temporaries."""
    hidden, weight, _, ref_hidden, ref_weight, _ = sides
    bytes_of = lambda *arrays: sum(x.shape[1] * x.dtype.itemsize for x in arrays)  # noqa: E731
    by_row, by_column = bytes_of(hidden, ref_hidden), bytes_of(weight, ref_weight)
    sizes = [(rows, columns) for rows in (1024, 512, 256, 128, 64, 32, 16) for columns in (512, 384, 256, 128)]
    held = lambda rows, columns: 2 * (rows * by_row + columns * by_column) + 8 * rows * columns * 4  # noqa: E731
    rows, columns = next((size for size in sizes if held(*size) <= target.fast_memory * 5 // 8), sizes[-1])
    # 16 rows are one register of bfloat16; a small problem takes no larger block than it fills
    return min(rows, up(hidden.shape[0], 16)), min(columns, up(weight.shape[0], 128))


def _tpu_call(body, options, sides, row, scalars, out_shape, grid, out_spec, arbitrary):
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias = sides
    rows, columns = _tpu_tile(options.target, sides)
    # a block of rows that do not count asks for the tile it has, so that nothing is fetched for it
    column = lambda i, j, s: jnp.where(i * rows < s[0], j, 0)  # noqa: E731
    by_row = lambda width: pl.BlockSpec((rows, width), lambda i, j, s: (i, 0))  # noqa: E731
    by_column = lambda width: pl.BlockSpec((columns, width), lambda i, j, s: (column(i, j, s), 0))  # noqa: E731
    flat = pl.BlockSpec((1, columns), lambda i, j, s: (0, column(i, j, s)))
    wide = lambda b: jnp.zeros((1, weight.shape[0]), jnp.float32) if b is None else b[None, :]  # noqa: E731
    arguments = [hidden, weight, wide(bias), ref_hidden, ref_weight, wide(ref_bias)]
    specs = [by_row(hidden.shape[1]), by_column(weight.shape[1]), flat]
    specs += [by_row(ref_hidden.shape[1]), by_column(ref_weight.shape[1]), flat]
    if row is not None:
        arguments, specs = [*arguments, row], [*specs, by_row(row.shape[1])]
    semantics = ("parallel", "arbitrary" if arbitrary else "parallel")
    return pl.pallas_call(
        functools.partial(body, options, weight.shape[0]),
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=grid, in_specs=specs, out_specs=out_spec(rows, columns)
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=semantics, vmem_limit_bytes=options.target.fast_memory * 15 // 16
        ),
        interpret=options.target.interpret,
    )(scalars, *arguments)


def _tpu_raw(h, w, b):
    hidden = h[...]
    return times("nd,vd->nv", hidden, w[...].astype(hidden.dtype)) + b[...]


def _tpu_stats(options, sides, count):
    hidden, weight = sides[:2]
    rows, columns = _tpu_tile(options.target, sides)
    grid = pl.cdiv(hidden.shape[0], rows), pl.cdiv(weight.shape[0], columns)
    shape = jax.ShapeDtypeStruct((hidden.shape[0], len(Stats._fields)), jnp.float32)
    spec = lambda rows, columns: pl.BlockSpec((rows, len(Stats._fields)), lambda i, j, s: (i, 0))  # noqa: E731
    scalars = jnp.stack([count.astype(jnp.int32), jnp.int32(0)])
    out = _tpu_call(_tpu_stats_body, options, sides, None, scalars, shape, grid, spec, True)
    return Stats(*jnp.split(out, len(Stats._fields), axis=1))


def _tpu_stats_body(options, vocabulary, scalars, h, w, b, ref_h, ref_w, ref_b, out):
    """Program (i, j): rows i, columns j. `out` stays in VMEM while j runs."""
    i, j = pl.program_id(0), pl.program_id(1)
    rows, columns = h.shape[0], w.shape[0]

    @pl.when(j == 0)
    def _():
        _write(out, empty(rows))

    @pl.when(i * rows < scalars[0])
    def _():
        z, _ = squash(_tpu_raw(h, w, b), options.softcap, options.temperature)
        y, _ = squash(_tpu_raw(ref_h, ref_w, ref_b), options.ref_softcap, options.temperature)
        ids = j * columns + jax.lax.broadcasted_iota(jnp.int32, (rows, columns), 1)
        _write(out, join(_read(out), of_tile(z, y, ids < vocabulary)))


def _tpu_logits(options, logits, ref_logits):
    """Tiles of [256, 1024]: 2 MiB of float32 for both, twice for the pipeline."""
    length, vocabulary = logits.shape
    rows, columns = min(256, up(length, 16)), min(1024, up(vocabulary, 128))
    block = pl.BlockSpec((rows, columns), lambda i, j: (i, j))
    out = pl.pallas_call(
        functools.partial(_tpu_logits_body, vocabulary),
        out_shape=jax.ShapeDtypeStruct((length, len(Stats._fields)), jnp.float32),
        grid=(pl.cdiv(length, rows), pl.cdiv(vocabulary, columns)),
        in_specs=[block, block],
        out_specs=pl.BlockSpec((rows, len(Stats._fields)), lambda i, j: (i, 0)),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=options.target.interpret,
    )(logits, ref_logits)
    return Stats(*jnp.split(out, len(Stats._fields), axis=1))


def _tpu_logits_body(vocabulary, z, y, out):
    j = pl.program_id(1)

    @pl.when(j == 0)
    def _():
        _write(out, empty(z.shape[0]))

    ids = j * z.shape[1] + jax.lax.broadcasted_iota(jnp.int32, z.shape, 1)
    tile = of_tile(z[...].astype(jnp.float32), y[...].astype(jnp.float32), ids < vocabulary)
    _write(out, join(_read(out), tile))


def _read(ref) -> Stats:
    return Stats(*(ref[:, k : k + 1] for k in range(len(Stats._fields))))


def _write(ref, stats: Stats) -> None:
    for k, x in enumerate(stats):
        ref[:, k : k + 1] = x


def _tpu_dz(options, slab, row, count, first):
    hidden, weight = slab[:2]
    rows, columns = _tpu_tile(options.target, slab)
    grid = pl.cdiv(hidden.shape[0], rows), pl.cdiv(weight.shape[0], columns)
    shape = jax.ShapeDtypeStruct((hidden.shape[0], weight.shape[0]), hidden.dtype)
    spec = lambda rows, columns: pl.BlockSpec((rows, columns), lambda i, j, s: (i, j))  # noqa: E731
    scalars = jnp.stack([count.astype(jnp.int32), first.astype(jnp.int32)])
    return _tpu_call(_tpu_dz_body, options, slab, jnp.concatenate(row, axis=1), scalars, shape, grid, spec, False)


def _tpu_dz_body(options, size, scalars, h, w, b, ref_h, ref_w, ref_b, row, out):
    i, j = pl.program_id(0), pl.program_id(1)
    rows, columns = out.shape
    counts = i * rows < scalars[0]

    @pl.when(counts)
    def _():
        ids = j * columns + jax.lax.broadcasted_iota(jnp.int32, (rows, columns), 1)
        raw, ref_raw = _tpu_raw(h, w, b), _tpu_raw(ref_h, ref_w, ref_b)
        of_row = Row(*(row[:, k : k + 1] for k in range(len(Row._fields))))
        out[...] = _dz(options, raw, ref_raw, of_row, ids >= scalars[1]).astype(out.dtype)

    @pl.when(~counts)
    def _():
        out[...] = jnp.zeros_like(out)


# GPU (Triton): a program holds a tile of z and one of y in registers and walks along D.
#
# 128 x 128 in float32 by 8 warps is 64 registers a thread for each of z and y; the tiles of hidden and weight, 128 x 64
# of 2 bytes each in 3 stages, are 96 KiB of the 227 KiB of shared memory of an H100. Forward, the vocabulary is cut
# into splits, so that a few thousand tokens still fill every multiprocessor; their Stats join afterwards. Programs of
# one split run side by side over the rows, and so find each other's weights in the L2 cache.

WARPS, STAGES, SPLITS = 8, 3, 16


def _gpu_tile(sides) -> tuple[int, int, int]:
    """rows, columns and the step along D, each a power of two, as Triton wants."""
    hidden, weight = sides[:2]
    fit = lambda largest, n: max(16, min(largest, pl.next_power_of_2(n)))  # noqa: E731
    return fit(128, hidden.shape[0]), fit(128, weight.shape[0]), fit(64 if hidden.dtype.itemsize == 2 else 32, 10**6)


def _gpu_raw(h, w, b, row_start, column_start, tile):
    """hidden @ weightᵀ + bias of one tile; beyond N, V and D zeros are read."""
    rows, columns, depth = tile
    in_rows = (row_start + jnp.arange(rows) < h.shape[0])[:, None]
    in_columns = (column_start + jnp.arange(columns) < w.shape[0])[:, None]

    def step(k, total):
        inside = (k * depth + jnp.arange(depth) < h.shape[1])[None, :]
        width = pl.ds(k * depth, depth)
        x = plgpu.load(h.at[pl.ds(row_start, rows), width], mask=in_rows & inside, other=0)
        y = plgpu.load(w.at[pl.ds(column_start, columns), width], mask=in_columns & inside, other=0)
        return total + times("nd,vd->nv", x, y.astype(x.dtype))

    raw = jax.lax.fori_loop(0, pl.cdiv(h.shape[1], depth), step, jnp.zeros((rows, columns), jnp.float32))
    ids = column_start + jnp.arange(columns)
    return raw + plgpu.load(b.at[pl.ds(column_start, columns)], mask=ids < w.shape[0], other=0.0)[None, :]


def _gpu_call(body, options, sides, extras, out_shape, grid):
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias = sides
    flat = lambda b: jnp.zeros(weight.shape[0], jnp.float32) if b is None else b  # noqa: E731
    return pl.pallas_call(
        functools.partial(body, options, _gpu_tile(sides)),
        out_shape=out_shape,
        grid=grid,
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        interpret=options.target.interpret,
    )(hidden, weight, flat(bias), ref_hidden, ref_weight, flat(ref_bias), *extras)


def _gpu_stats(options, sides, count):
    hidden, weight = sides[:2]
    rows, columns, _ = _gpu_tile(sides)
    splits = min(SPLITS, pl.cdiv(weight.shape[0], columns))
    shape = [jax.ShapeDtypeStruct((splits, hidden.shape[0]), jnp.float32)] * len(Stats._fields)
    grid = pl.cdiv(hidden.shape[0], rows), splits
    out = _gpu_call(_gpu_stats_body, options, sides, [count.astype(jnp.int32)[None]], shape, grid)
    return functools.reduce(join, [Stats(*(x[k, :, None] for x in out)) for k in range(splits)])


def _gpu_stats_body(options, tile, h, w, b, ref_h, ref_w, ref_b, count, *out):
    """Program (i, s): rows i, and every columns of split s."""
    i, split = pl.program_id(0), pl.program_id(1)
    rows, columns, _ = tile
    tiles, splits = pl.cdiv(w.shape[0], columns), out[0].shape[0]

    def see(k, stats):
        start = (split + k * splits) * columns
        z, _ = squash(_gpu_raw(h, w, b, i * rows, start, tile), options.softcap, options.temperature)
        y, _ = squash(_gpu_raw(ref_h, ref_w, ref_b, i * rows, start, tile), options.ref_softcap, options.temperature)
        fresh = jnp.broadcast_to((start + jnp.arange(columns) < w.shape[0])[None, :], z.shape)
        return join(stats, of_tile(z, y, fresh))

    mine = jnp.where(i * rows < count[0], (tiles - split + splits - 1) // splits, 0)
    stats = jax.lax.fori_loop(0, mine, see, empty(rows))
    _store(out, split, i * rows, stats, h.shape[0])


def _gpu_logits(options, logits, ref_logits):
    """Tiles of [16, 256], 16 elements a thread: there is nothing to do but read."""
    length, vocabulary = logits.shape
    splits = min(SPLITS, pl.cdiv(vocabulary, 256))
    out = pl.pallas_call(
        _gpu_logits_body,
        out_shape=[jax.ShapeDtypeStruct((splits, length), jnp.float32)] * len(Stats._fields),
        grid=(pl.cdiv(length, 16), splits),
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=STAGES),
        interpret=options.target.interpret,
    )(logits, ref_logits)
    return functools.reduce(join, [Stats(*(x[k, :, None] for x in out)) for k in range(splits)])


def _gpu_logits_body(logits, ref_logits, *out):
    i, split = pl.program_id(0), pl.program_id(1)
    tiles, splits = pl.cdiv(logits.shape[1], 256), out[0].shape[0]
    inside = (i * 16 + jnp.arange(16) < logits.shape[0])[:, None]

    def see(k, stats):
        start = (split + k * splits) * 256
        fresh = inside & (start + jnp.arange(256) < logits.shape[1])[None, :]
        at = pl.ds(i * 16, 16), pl.ds(start, 256)
        z, y = (plgpu.load(x.at[at], mask=fresh, other=0).astype(jnp.float32) for x in (logits, ref_logits))
        return join(stats, of_tile(z, y, fresh))

    stats = jax.lax.fori_loop(0, (tiles - split + splits - 1) // splits, see, empty(16))
    _store(out, split, i * 16, stats, logits.shape[0])


def _store(out, split, start, stats, length) -> None:
    for ref, x in zip(out, stats, strict=True):
        at = pl.ds(start, x.shape[0])
        plgpu.store(ref.at[split, at], jnp.sum(x, axis=1), mask=start + jnp.arange(x.shape[0]) < length)


def _gpu_dz(options, slab, row, count, first):
    hidden, weight = slab[:2]
    rows, columns, _ = _gpu_tile(slab)
    shape = jax.ShapeDtypeStruct((hidden.shape[0], weight.shape[0]), hidden.dtype)
    grid = pl.cdiv(hidden.shape[0], rows), pl.cdiv(weight.shape[0], columns)
    scalars = jnp.stack([count.astype(jnp.int32), first.astype(jnp.int32)])
    return _gpu_call(_gpu_dz_body, options, slab, [scalars, *(x[:, 0] for x in row)], shape, grid)


def _gpu_dz_body(options, tile, h, w, b, ref_h, ref_w, ref_b, scalars, log_z, ref_log_z, value, g, out):
    rows, columns, _ = tile
    row_start, column_start = pl.program_id(0) * rows, pl.program_id(1) * columns
    ids, at = column_start + jnp.arange(columns), row_start + jnp.arange(rows)
    inside = (at < h.shape[0])[:, None] & (ids < w.shape[0])[None, :]
    block = out.at[pl.ds(row_start, rows), pl.ds(column_start, columns)]

    def make():
        raw = _gpu_raw(h, w, b, row_start, column_start, tile)
        ref_raw = _gpu_raw(ref_h, ref_w, ref_b, row_start, column_start, tile)
        load = lambda x: plgpu.load(x.at[pl.ds(row_start, rows)], mask=at < h.shape[0], other=0.0)[:, None]  # noqa: E731
        fresh = jnp.broadcast_to((ids >= scalars[1])[None, :], raw.shape)
        of_row = Row(load(log_z), load(ref_log_z), load(value), load(g))
        return _dz(options, raw, ref_raw, of_row, fresh)

    counts = row_start < scalars[0]
    dz = jax.lax.cond(counts, make, lambda: jnp.zeros((rows, columns), jnp.float32))
    plgpu.store(block, dz.astype(out.dtype), mask=inside)
