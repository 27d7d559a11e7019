"""The bodies of `logprob.py` for NVIDIA GPUs, in Triton through Pallas.

Forward: a program owns `rows` tokens and a run of vocabulary tiles, whose statistics it keeps in registers; the runs
are merged outside. Neighbouring programs share a run, so its weights are read from HBM once and from L2 by the
others.

Backward: one kernel computes the gradient of a chunk of logits, [N, chunk] in the dtype of compute (product, soft-cap,
softmax and slope, while the float32 logits stay in registers); XLA's cuBLAS, which is hard to beat, computes the two
products with it. The alternative, adding into dhidden and dweight from every tile with atomics, sums in another order
in every run, and a resumed run must be the same bit for bit.

A program of 8 warps holds a [128, 128] float32 tile in 64 registers a thread, and in shared memory, for each stage of
the pipeline, [128, 64] of both operands: 32 KiB in bfloat16, three stages 96 KiB of the 227 that a block may use on an
H100 (float32 has [128, 32], so as many bytes). From HBM, a byte of weight serves `tokens` operations as long as L2 (50
MiB) holds a run; from L2, 64 operations.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxalign.kernels import logprob_tile as tile
from jaxalign.kernels.products import times
from jaxalign.kernels.runtime import Target, up

STAGES, WARPS = 3, 8
CHUNK_LOGITS = 2**26  # 128 MiB in bfloat16


class Tiles(NamedTuple):
    rows: int
    columns: int
    depth: int  # columns of the width D at a time
    run: int  # vocabulary tiles of a program in the forward pass


def shared_bytes(tiles: Tiles, itemsize: int) -> int:
    """Bytes of shared memory of a program's pipeline."""
    return STAGES * (tiles.rows + tiles.columns) * tiles.depth * itemsize


def choose_tiles(itemsize: int, target: Target) -> Tiles | None:
    """The shape that the module's docstring derives; None on a GPU with too little shared memory for it."""
    tiles = Tiles(128, 128, 128 // itemsize, 16)
    return tiles if shared_bytes(tiles, itemsize) <= target.fast_memory or target.interpret else None


def chunk_columns(tokens: int, vocabulary: int, tiles: Tiles) -> int:
    """Columns of a chunk of the backward pass: equal chunks, of about CHUNK_LOGITS logits at most."""
    most = max(CHUNK_LOGITS // max(tokens, 1), tiles.columns)
    return up(-(-vocabulary // -(-vocabulary // most)), tiles.columns)


def forward(
    count: jax.Array,  # Int32[1]: number of tokens that count, which come first
    hidden: jax.Array,  # [N D], N, V and D multiples of the tile
    weight: jax.Array,  # [V D]
    bias: jax.Array | None,  # [V]
    targets: jax.Array,  # Int32[N], -1 if it is in another shard
    *,
    vocabulary: int,
    tiles: Tiles,
    options: tile.Options,
    target: Target,
) -> tile.Statistics:
    """Statistics [runs, N]; row tiles without a token that counts are not written."""
    n, column_tiles = hidden.shape[0], weight.shape[0] // tiles.columns
    runs = -(-column_tiles // tiles.run)
    out = pl.pallas_call(
        functools.partial(_forward_body, bias is not None, vocabulary, column_tiles, tiles, options),
        grid=(n // tiles.rows, runs),  # the first axis runs fastest: neighbours share weights
        out_shape=jax.ShapeDtypeStruct((len(tile.Statistics._fields), runs, n), jnp.float32),
        compiler_params=plt.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        interpret=target.interpret,
        name="logprob_forward",
    )(count, hidden, weight, *(() if bias is None else (bias,)), targets)
    return tile.Statistics(*out)


def _forward_body(
    has_bias: bool, vocabulary: int, column_tiles: int, tiles: Tiles, options: tile.Options, count, *refs
) -> None:
    hidden, weight, *rest = refs
    bias, rest = (rest[0], rest[1:]) if has_bias else (None, rest)
    targets, out = rest
    i, run = pl.program_id(0), pl.program_id(1)
    rows = pl.ds(i * tiles.rows, tiles.rows)

    @pl.when(i * tiles.rows < count[0])
    def _():
        wanted = targets[rows][:, None]

        def see(j, stats):
            z, _, ids = _logits(hidden, weight, bias, i, j, j, tiles, options)
            return tile.see(stats, z, ids, wanted, vocabulary, options)

        end = jnp.minimum((run + 1) * tiles.run, column_tiles)
        stats = jax.lax.fori_loop(run * tiles.run, end, see, tile.start((tiles.rows, 1)))
        for k, value in enumerate(stats):
            out[k, run, rows] = value.reshape(tiles.rows)


def backward(
    count: jax.Array,
    hidden: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    targets: jax.Array,
    slopes: tile.Slopes,  # [N], 0 at tokens that do not count
    *,
    vocabulary: int,
    tiles: Tiles,
    options: tile.Options,
    target: Target,
    dtype: jnp.dtype,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """(dhidden [N D] in its dtype, dweight [V D] in `dtype`, dbias [V] in float32); V a multiple of the chunk."""
    n, width = hidden.shape
    chunk = chunk_columns(n, vocabulary, tiles)
    packed = jnp.stack([*slopes])

    def back(d_hidden: jax.Array, part: tuple) -> tuple[jax.Array, tuple]:
        k, columns, shift = part
        d_raw, d_bias = _d_raw(k, count, hidden, columns, shift, targets, packed, vocabulary, tiles, options, target)
        return d_hidden + times("nc,cd->nd", d_raw, columns), (
            times("nc,nd->cd", d_raw, hidden).astype(dtype),
            d_bias,
        )

    parts = weight.reshape(-1, chunk, width), None if bias is None else bias.reshape(-1, chunk)
    start = jnp.zeros(hidden.shape, jnp.float32)
    d_hidden, (d_weight, d_bias) = jax.lax.scan(back, start, (jnp.arange(weight.shape[0] // chunk), *parts))
    d_bias = None if d_bias is None else d_bias.reshape(-1)
    return d_hidden.astype(hidden.dtype), d_weight.reshape(weight.shape), d_bias


def _d_raw(
    k: jax.Array,
    count: jax.Array,
    hidden: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    targets: jax.Array,
    packed: jax.Array,
    vocabulary: int,
    tiles: Tiles,
    options: tile.Options,
    target: Target,
) -> tuple[jax.Array, jax.Array | None]:
    """dloss/draw [N chunk] of chunk k in the dtype of hidden, and with a bias its float32 sum over tokens."""
    n, chunk = hidden.shape[0], weight.shape[0]
    grid = n // tiles.rows, chunk // tiles.columns
    out = [jax.ShapeDtypeStruct((n, chunk), hidden.dtype)]
    if bias is not None:
        out.append(jax.ShapeDtypeStruct((grid[0], chunk), jnp.float32))
    first = (k * (chunk // tiles.columns)).astype(jnp.int32)[None]
    outputs = pl.pallas_call(
        functools.partial(_backward_body, bias is not None, vocabulary, tiles, options),
        grid=grid,
        out_shape=out,
        compiler_params=plt.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        interpret=target.interpret,
        name="logprob_backward",
    )(jnp.concatenate([count, first]), hidden, weight, *(() if bias is None else (bias,)), targets, packed)
    return outputs[0], None if bias is None else jnp.sum(outputs[1], axis=0)


def _backward_body(has_bias: bool, vocabulary: int, tiles: Tiles, options: tile.Options, scalars, *refs) -> None:
    hidden, weight, *rest = refs
    bias, rest = (rest[0], rest[1:]) if has_bias else (None, rest)
    targets, packed, out, *rest = rest
    i, j = pl.program_id(0), pl.program_id(1)
    rows, columns = pl.ds(i * tiles.rows, tiles.rows), pl.ds(j * tiles.columns, tiles.columns)
    counts = i * tiles.rows < scalars[0]

    @pl.when(counts)
    def _():
        z, slope, ids = _logits(hidden, weight, bias, i, j, scalars[1] + j, tiles, options)
        slopes = tile.Slopes(*(packed[k, rows][:, None] for k in range(len(tile.Slopes._fields))))
        d_raw = tile.back(z, slope, ids, targets[rows][:, None], slopes, vocabulary, options)
        out[rows, columns] = d_raw.astype(out.dtype)
        if rest:
            rest[0][i, columns] = jnp.sum(d_raw, axis=0)

    @pl.when(jnp.logical_not(counts))
    def _():
        out[rows, columns] = jnp.zeros((tiles.rows, tiles.columns), out.dtype)
        if rest:
            rest[0][i, columns] = jnp.zeros((tiles.columns,), jnp.float32)


def _logits(hidden, weight, bias, i, j, position, tiles: Tiles, options: tile.Options) -> tuple:
    """(z, slope, ids) of row tile i and column tile j of the chunk, tile `position` of the vocabulary."""
    rows, columns = pl.ds(i * tiles.rows, tiles.rows), pl.ds(j * tiles.columns, tiles.columns)

    def add(k, raw):
        deep = pl.ds(k * tiles.depth, tiles.depth)
        return raw + times("nd,vd->nv", hidden[rows, deep], weight[columns, deep])

    shape = tiles.rows, tiles.columns
    raw = jax.lax.fori_loop(0, hidden.shape[1] // tiles.depth, add, jnp.zeros(shape, jnp.float32))
    z, slope = tile.logits(raw, None if bias is None else bias[columns][None, :], options)
    return z, slope, position * tiles.columns + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
