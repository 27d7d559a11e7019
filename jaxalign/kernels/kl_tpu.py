"""The bodies of `kl.py` for TPUs, in Mosaic: a program holds rows and columns of both, whole in D.

In VMEM, twice for the pipeline: hidden [rows D], ref_hidden [rows R], weight [columns D], ref_weight [columns R]; and
once about eight float32 tiles [rows columns]. Llama-3 8B in bfloat16: 1024 x 512 on a v5e or v6e, 2 x 24 + 16 of
128 MiB, and 512 x 384 on a v5p, 2 x 14 + 6 of 64. Every element of a fetched weight tile is multiplied with `rows`
rows: as many FLOP a byte, more than the 240 of a v5e, the 166 of a v5p and the 560 of a v6e that balance compute and
bandwidth.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxalign.kernels.kl_tile import Row, Stats, empty, gradient, merge, of_tile, squash
from jaxalign.kernels.products import times
from jaxalign.kernels.runtime import Target, up


def _tile(target: Target, sides) -> tuple[int, int]:
    """The tallest tile, then the widest, within five eighths of VMEM, which leaves the compiler its own temporaries."""
    hidden, weight, _, ref_hidden, ref_weight, _ = sides
    by_row, by_column = (
        sum(x.shape[1] * x.dtype.itemsize for x in pair) for pair in ((hidden, ref_hidden), (weight, ref_weight))
    )

    def fits(rows: int, columns: int) -> bool:
        used = 2 * (rows * by_row + columns * by_column) + 8 * rows * columns * 4
        return used <= target.fast_memory * 5 // 8

    sizes = [(rows, columns) for rows in (1024, 512, 256, 128, 64, 32, 16) for columns in (512, 384, 256, 128)]
    rows, columns = next((size for size in sizes if fits(*size)), sizes[-1])
    # 16 rows are one register of bfloat16; a small problem gets no larger block than it fills
    return min(rows, up(hidden.shape[0], 16)), min(columns, up(weight.shape[0], 128))


def _call(body, options, sides, row, scalars, out_shape, grid, out_spec, arbitrary):
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias = sides
    rows, columns = _tile(options.target, sides)

    def column(i, j, s):
        # a block of rows that do not count names the tile that was fetched last, so that nothing is fetched for it
        return jnp.where(i * rows < s[0], j, 0)

    def by_row(x):
        return pl.BlockSpec((rows, x.shape[1]), lambda i, j, s: (i, 0))

    def by_column(x):
        return pl.BlockSpec((columns, x.shape[1]), lambda i, j, s: (column(i, j, s), 0))

    flat = pl.BlockSpec((1, columns), lambda i, j, s: (0, column(i, j, s)))
    bias, ref_bias = (
        jnp.zeros((1, weight.shape[0]), jnp.float32) if b is None else b[None, :] for b in (bias, ref_bias)
    )
    arguments = [hidden, weight, bias, ref_hidden, ref_weight, ref_bias]
    specs = [by_row(hidden), by_column(weight), flat, by_row(ref_hidden), by_column(ref_weight), flat]
    if row is not None:
        arguments, specs = [*arguments, row], [*specs, by_row(row)]
    semantics = ("parallel", "arbitrary" if arbitrary else "parallel")
    return pl.pallas_call(
        functools.partial(body, options, weight.shape[0]),
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=1, grid=grid, in_specs=specs, out_specs=out_spec),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=semantics, vmem_limit_bytes=options.target.fast_memory * 15 // 16
        ),
        interpret=options.target.interpret,
    )(scalars, *arguments)


def _raw(h, w, b):
    hidden = h[...]
    return times("nd,vd->nv", hidden, w[...].astype(hidden.dtype)) + b[...]


def stats(options, sides, count):
    hidden, weight = sides[:2]
    rows, columns = _tile(options.target, sides)
    grid = pl.cdiv(hidden.shape[0], rows), pl.cdiv(weight.shape[0], columns)
    shape = jax.ShapeDtypeStruct((hidden.shape[0], len(Stats._fields)), jnp.float32)
    spec = pl.BlockSpec((rows, len(Stats._fields)), lambda i, j, s: (i, 0))
    scalars = jnp.stack([count.astype(jnp.int32), jnp.int32(0)])
    out = _call(_stats_body, options, sides, None, scalars, shape, grid, spec, True)
    return Stats(*jnp.split(out, len(Stats._fields), axis=1))


def _stats_body(options, vocabulary, scalars, h, w, b, ref_h, ref_w, ref_b, out):
    """Program (i, j): rows i, columns j. `out` stays in VMEM while j runs."""
    i, j = pl.program_id(0), pl.program_id(1)
    rows, columns = h.shape[0], w.shape[0]

    @pl.when(j == 0)
    def _():
        _write(out, empty(rows))

    @pl.when(i * rows < scalars[0])
    def _():
        z, _ = squash(_raw(h, w, b), options.softcap, options.temperature)
        y, _ = squash(_raw(ref_h, ref_w, ref_b), options.ref_softcap, options.temperature)
        ids = j * columns + jax.lax.broadcasted_iota(jnp.int32, (rows, columns), 1)
        _write(out, merge(_read(out), of_tile(z, y, ids < vocabulary)))


def logits_stats(options, logits, ref_logits):
    """Stats from tiles of [256, 1024]: 2 MiB of float32 for both, twice for the pipeline."""
    length, vocabulary = logits.shape
    rows, columns = min(256, up(length, 16)), min(1024, up(vocabulary, 128))
    block = pl.BlockSpec((rows, columns), lambda i, j: (i, j))
    out = pl.pallas_call(
        functools.partial(_logits_body, vocabulary),
        out_shape=jax.ShapeDtypeStruct((length, len(Stats._fields)), jnp.float32),
        grid=(pl.cdiv(length, rows), pl.cdiv(vocabulary, columns)),
        in_specs=[block, block],
        out_specs=pl.BlockSpec((rows, len(Stats._fields)), lambda i, j: (i, 0)),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=options.target.interpret,
    )(logits, ref_logits)
    return Stats(*jnp.split(out, len(Stats._fields), axis=1))


def _logits_body(vocabulary, z, y, out):
    j = pl.program_id(1)

    @pl.when(j == 0)
    def _():
        _write(out, empty(z.shape[0]))

    ids = j * z.shape[1] + jax.lax.broadcasted_iota(jnp.int32, z.shape, 1)
    tile = of_tile(z[...].astype(jnp.float32), y[...].astype(jnp.float32), ids < vocabulary)
    _write(out, merge(_read(out), tile))


def _read(ref) -> Stats:
    return Stats(*(ref[:, k : k + 1] for k in range(len(Stats._fields))))


def _write(ref, stats: Stats) -> None:
    for k, x in enumerate(stats):
        ref[:, k : k + 1] = x


def dz(options, slab, row, count, first):
    hidden, weight = slab[:2]
    rows, columns = _tile(options.target, slab)
    grid = pl.cdiv(hidden.shape[0], rows), pl.cdiv(weight.shape[0], columns)
    shape = jax.ShapeDtypeStruct((hidden.shape[0], weight.shape[0]), hidden.dtype)
    spec = pl.BlockSpec((rows, columns), lambda i, j, s: (i, j))
    scalars = jnp.stack([count.astype(jnp.int32), first.astype(jnp.int32)])
    return _call(_dz_body, options, slab, jnp.concatenate(row, axis=1), scalars, shape, grid, spec, False)


def _dz_body(options, size, scalars, h, w, b, ref_h, ref_w, ref_b, row, out):
    i, j = pl.program_id(0), pl.program_id(1)
    rows, columns = out.shape
    counts = i * rows < scalars[0]

    @pl.when(counts)
    def _():
        ids = j * columns + jax.lax.broadcasted_iota(jnp.int32, (rows, columns), 1)
        raw, ref_raw = _raw(h, w, b), _raw(ref_h, ref_w, ref_b)
        of_row = Row(*(row[:, k : k + 1] for k in range(len(Row._fields))))
        out[...] = gradient(options, raw, ref_raw, of_row, ids >= scalars[1]).astype(out.dtype)

    @pl.when(~counts)
    def _():
        out[...] = jnp.zeros_like(out)
