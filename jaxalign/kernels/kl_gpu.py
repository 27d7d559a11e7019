"""The bodies of `kl.py` for GPUs, in Triton: a program holds a tile of z and one of y and walks along D.

128 x 128 in float32 by 8 warps is 64 registers a thread for each of z and y; the tiles of hidden and weight, 128 x 64
of 2 bytes each in 3 stages, are 96 KiB of the 227 KiB of shared memory of an H100. Forward, the vocabulary is cut
into splits, so that a few thousand tokens still fill every multiprocessor; their Stats are merged afterwards. Programs
of one split run side by side over the rows, and so read its weights from the L2 cache.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxalign.kernels.kl_tile import Row, Stats, empty, gradient, merge, of_tile, squash
from jaxalign.kernels.products import times

WARPS, STAGES, SPLITS = 8, 3, 16


def _tile(sides) -> tuple[int, int, int]:
    """Rows, columns and the step along D, each a power of two, as Triton requires."""
    hidden, weight = sides[:2]
    rows, columns = (max(16, min(128, pl.next_power_of_2(x.shape[0]))) for x in (hidden, weight))
    return rows, columns, 64 if hidden.dtype.itemsize == 2 else 32


def _raw(h, w, b, row_start, column_start, tile):
    """hidden @ weightᵀ + bias of one tile; beyond N, V and D it reads zeros."""
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


def _call(body, options, sides, extras, out_shape, grid):
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias = sides
    bias, ref_bias = (jnp.zeros(weight.shape[0], jnp.float32) if b is None else b for b in (bias, ref_bias))
    return pl.pallas_call(
        functools.partial(body, options, _tile(sides)),
        out_shape=out_shape,
        grid=grid,
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        interpret=options.target.interpret,
    )(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, *extras)


def stats(options, sides, count):
    hidden, weight = sides[:2]
    rows, columns, _ = _tile(sides)
    splits = min(SPLITS, pl.cdiv(weight.shape[0], columns))
    shape = [jax.ShapeDtypeStruct((splits, hidden.shape[0]), jnp.float32)] * len(Stats._fields)
    grid = pl.cdiv(hidden.shape[0], rows), splits
    out = _call(_stats_body, options, sides, [count.astype(jnp.int32)[None]], shape, grid)
    return functools.reduce(merge, [Stats(*(x[k, :, None] for x in out)) for k in range(splits)])


def _stats_body(options, tile, h, w, b, ref_h, ref_w, ref_b, count, *out):
    """Program (i, s): rows i, and the column tiles s, s + splits, s + 2 · splits, ..."""
    i, split = pl.program_id(0), pl.program_id(1)
    rows, columns, _ = tile
    tiles, splits = pl.cdiv(w.shape[0], columns), out[0].shape[0]

    def see(k, stats):
        start = (split + k * splits) * columns
        z, _ = squash(_raw(h, w, b, i * rows, start, tile), options.softcap, options.temperature)
        y, _ = squash(_raw(ref_h, ref_w, ref_b, i * rows, start, tile), options.ref_softcap, options.temperature)
        fresh = jnp.broadcast_to((start + jnp.arange(columns) < w.shape[0])[None, :], z.shape)
        return merge(stats, of_tile(z, y, fresh))

    mine = jnp.where(i * rows < count[0], (tiles - split + splits - 1) // splits, 0)
    stats = jax.lax.fori_loop(0, mine, see, empty(rows))
    _store(out, split, i * rows, stats, h.shape[0])


def logits_stats(options, logits, ref_logits):
    """Stats from tiles of [16, 256], 16 elements a thread, which only have to be read."""
    length, vocabulary = logits.shape
    splits = min(SPLITS, pl.cdiv(vocabulary, 256))
    out = pl.pallas_call(
        _logits_body,
        out_shape=[jax.ShapeDtypeStruct((splits, length), jnp.float32)] * len(Stats._fields),
        grid=(pl.cdiv(length, 16), splits),
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=STAGES),
        interpret=options.target.interpret,
    )(logits, ref_logits)
    return functools.reduce(merge, [Stats(*(x[k, :, None] for x in out)) for k in range(splits)])


def _logits_body(logits, ref_logits, *out):
    i, split = pl.program_id(0), pl.program_id(1)
    tiles, splits = pl.cdiv(logits.shape[1], 256), out[0].shape[0]
    inside = (i * 16 + jnp.arange(16) < logits.shape[0])[:, None]

    def see(k, stats):
        start = (split + k * splits) * 256
        fresh = inside & (start + jnp.arange(256) < logits.shape[1])[None, :]
        at = pl.ds(i * 16, 16), pl.ds(start, 256)
        z, y = (plgpu.load(x.at[at], mask=fresh, other=0).astype(jnp.float32) for x in (logits, ref_logits))
        return merge(stats, of_tile(z, y, fresh))

    stats = jax.lax.fori_loop(0, (tiles - split + splits - 1) // splits, see, empty(16))
    _store(out, split, i * 16, stats, logits.shape[0])


def _store(out, split, start, stats, length) -> None:
    for ref, x in zip(out, stats, strict=True):
        at = pl.ds(start, x.shape[0])
        plgpu.store(ref.at[split, at], jnp.sum(x, axis=1), mask=start + jnp.arange(x.shape[0]) < length)


def dz(options, slab, row, count, first):
    hidden, weight = slab[:2]
    rows, columns, _ = _tile(slab)
    shape = jax.ShapeDtypeStruct((hidden.shape[0], weight.shape[0]), hidden.dtype)
    grid = pl.cdiv(hidden.shape[0], rows), pl.cdiv(weight.shape[0], columns)
    scalars = jnp.stack([count.astype(jnp.int32), first.astype(jnp.int32)])
    return _call(_dz_body, options, slab, [scalars, *(x[:, 0] for x in row)], shape, grid)


def _dz_body(options, tile, h, w, b, ref_h, ref_w, ref_b, scalars, log_z, ref_log_z, value, g, out):
    rows, columns, _ = tile
    row_start, column_start = pl.program_id(0) * rows, pl.program_id(1) * columns
    ids, at = column_start + jnp.arange(columns), row_start + jnp.arange(rows)
    inside = (at < h.shape[0])[:, None] & (ids < w.shape[0])[None, :]
    block = out.at[pl.ds(row_start, rows), pl.ds(column_start, columns)]

    def load(x):
        return plgpu.load(x.at[pl.ds(row_start, rows)], mask=at < h.shape[0], other=0.0)[:, None]

    def make():
        raw = _raw(h, w, b, row_start, column_start, tile)
        ref_raw = _raw(ref_h, ref_w, ref_b, row_start, column_start, tile)
        fresh = jnp.broadcast_to((ids >= scalars[1])[None, :], raw.shape)
        of_row = Row(load(log_z), load(ref_log_z), load(value), load(g))
        return gradient(options, raw, ref_raw, of_row, fresh)

    counts = row_start < scalars[0]
    dz = jax.lax.cond(counts, make, lambda: jnp.zeros((rows, columns), jnp.float32))
    plgpu.store(block, dz.astype(out.dtype), mask=inside)
