"""The bodies of `logprob.py` for TPUs, in Mosaic.

Rows are tiled by `rows`, the vocabulary by `columns`; the width D stays whole, so that a row tile of hidden states is
read once, and then all tiles of the weight. One step of the grid multiplies [rows, D] by [D, columns].

Arithmetic intensity. Forward: 2 rows D columns operations for 2 D columns bytes of bfloat16 weight: `rows` operations
a byte. Backward: 6 rows D columns for 2 bytes of weight, and 4 read and 4 written of its float32 gradient: 0.6 rows.
A chip's own ratio (bfloat16 peak / HBM bandwidth, from its data sheet) is 240 on v5e, 166 on v5p and 560 on v6e: rows
>= 1024 keep the matrix unit of every one of them busy in both directions, rows = 512 that of v5p and v5e.

Backward is one pass, not two: two passes (one for dhidden, one for dweight) would each compute the logits again, 8 rows
D columns operations instead of 6. dhidden of a row tile is summed in VMEM; dweight is summed in HBM, tile by tile, by
copies that the kernel starts itself and that overlap with the products. There are no atomics, so the sums are the same
in every run.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxalign.kernels import logprob_tile as tile
from jaxalign.kernels.products import precision_of
from jaxalign.kernels.runtime import MIB, Target, up

LANES = 128  # a [rows, 1] float32 takes [rows, 128] of VMEM


class Tiles(NamedTuple):
    rows: int
    columns: int


def vmem_bytes(tiles: Tiles, width: int, itemsize: int, *, backward: bool) -> int:
    """VMEM of a step. Blocks that the pipeline fetches or stores count twice: the one in use, the one in flight.

    Float32 products are computed from bfloat16 parts of both operands, which the compiler keeps with their transposes;
    by its own account that doubles the bytes (Gemma 2 2B in float32, backward, [512, 256]: 36 MiB listed, 71 used).
    """
    return (2 if itemsize == 4 else 1) * _listed_bytes(tiles, width, itemsize, backward)


def _listed_bytes(tiles: Tiles, width: int, itemsize: int, backward: bool) -> int:
    rows, columns = tiles
    total = 2 * rows * width * itemsize  # hidden
    total += 2 * columns * width * itemsize  # weight
    total += 4 * rows * columns * 4  # logits, and arrays computed from them
    total += 2 * (2 if backward else 1) * rows * LANES * 4  # targets and slopes, or targets
    if not backward:
        return total + 8 * rows * LANES * 4  # six statistics, and their output block
    total += rows * width * 4 + 2 * rows * width * itemsize  # dhidden: its sum, and its output block
    return total + 3 * columns * width * 4  # dweight: a tile being added to, one on its way out, one being computed


def choose_tiles(
    tokens: int, vocabulary: int, width: int, itemsize: int, target: Target, *, backward: bool
) -> Tiles | None:
    """The tallest tile that fits three quarters of VMEM; its columns pad the vocabulary least, the most of equals.

    None if not even the smallest tile fits.
    """
    for rows in (1024, 512, 256, 128):
        fits = [
            Tiles(rows, columns)
            for columns in (512, 384, 256, 128)
            if vmem_bytes(Tiles(rows, columns), width, itemsize, backward=backward) <= target.fast_memory * 3 // 4
        ]
        if fits and rows <= up(tokens, 128):
            wide = [tiles for tiles in fits if tiles.columns > 128] or fits
            return min(wide, key=lambda tiles: (up(vocabulary, tiles.columns), -tiles.columns))
    return None


def forward(
    count: jax.Array,  # Int32[1]: number of tokens that count, which come first
    hidden: jax.Array,  # [N D], N and D multiples of the tile
    weight: jax.Array,  # [V D]
    bias: jax.Array | None,  # [1 V]
    targets: jax.Array,  # Int32[N 1], -1 if it is in another shard
    *,
    vocabulary: int,
    tiles: Tiles,
    options: tile.Options,
    target: Target,
) -> tile.Statistics:
    """Statistics [N]; row tiles without a token that counts are not written."""
    rows, columns = tiles
    (n, width), v = hidden.shape, weight.shape[0]
    last = v // columns - 1

    def row_tile(i, j, count):
        return jnp.minimum(i, _active(count, rows) - 1), 0

    def column_tile(i, j, count):
        # An idle step names the tile that was fetched last, so nothing is fetched.
        return jnp.where(i < _active(count, rows), j, last), 0

    in_specs = [pl.BlockSpec((rows, width), row_tile), pl.BlockSpec((columns, width), column_tile)]
    if bias is not None:
        in_specs.append(pl.BlockSpec((1, columns), lambda i, j, count: column_tile(i, j, count)[::-1]))
    in_specs.append(pl.BlockSpec((rows, 1), row_tile))
    body = functools.partial(_forward_body, bias is not None, vocabulary, tiles, options)
    out = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(n // rows, v // columns),
            in_specs=in_specs,
            out_specs=pl.BlockSpec((rows, LANES), lambda i, j, count: (i, 0)),
            scratch_shapes=[pltpu.VMEM((rows, 1), jnp.float32)] * len(tile.Statistics._fields),
        ),
        out_shape=jax.ShapeDtypeStruct((n, LANES), jnp.float32),
        compiler_params=_params(tiles, width, hidden.dtype.itemsize, target, backward=False),
        cost_estimate=pl.CostEstimate(
            flops=2 * n * v * width,
            transcendentals=n * v,
            bytes_accessed=(n // rows) * weight.nbytes + hidden.nbytes,
        ),
        interpret=target.interpret,
        name="logprob_forward",
    )(count, hidden, weight, *(() if bias is None else (bias,)), targets)
    return tile.Statistics(*(out[:, k] for k in range(len(tile.Statistics._fields))))


def _forward_body(has_bias: bool, vocabulary: int, tiles: Tiles, options: tile.Options, count, *refs) -> None:
    hidden, weight, *rest = refs
    bias, rest = (rest[0], rest[1:]) if has_bias else (None, rest)
    targets, out, *stats = rest
    i, j = pl.program_id(0), pl.program_id(1)

    @pl.when(i < _active(count, tiles.rows))
    def _():
        @pl.when(j == 0)
        def _():
            for ref, value in zip(stats, tile.start((tiles.rows, 1)), strict=True):
                ref[...] = value

        z, _ = tile.logits(_times(hidden[...], weight[...], 1, 1), None if bias is None else bias[...], options)
        seen = tile.Statistics(*(ref[...] for ref in stats))
        seen = tile.see(seen, z, _ids(j, z.shape), targets[...], vocabulary, options)
        for ref, value in zip(stats, seen, strict=True):
            ref[...] = value

        @pl.when(j == pl.num_programs(1) - 1)
        def _():
            for k, value in enumerate(seen):
                out[:, k : k + 1] = value


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
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """(dhidden [N D] in its dtype, dweight [V D] in float32, dbias [V] in float32)."""
    rows, columns = tiles
    (n, width), v = hidden.shape, weight.shape[0]
    last = v // columns - 1
    packed = jnp.stack([*slopes], axis=1)
    packed = jnp.pad(packed, ((0, 0), (0, LANES - packed.shape[1])))

    def row_tile(i, j, count):
        return jnp.minimum(i, _active(count, rows) - 1), 0

    def column_tile(i, j, count):
        return jnp.where(i < _active(count, rows), j, last), 0

    in_specs = [pl.BlockSpec((rows, width), row_tile), pl.BlockSpec((columns, width), column_tile)]
    if bias is not None:
        in_specs.append(pl.BlockSpec((1, columns), lambda i, j, count: column_tile(i, j, count)[::-1]))
    in_specs += [pl.BlockSpec((rows, 1), row_tile), pl.BlockSpec((rows, LANES), row_tile)]
    out_specs = [pl.BlockSpec((rows, width), lambda i, j, count: (i, 0)), pl.BlockSpec(memory_space=pl.ANY)]
    out_shape = [jax.ShapeDtypeStruct(hidden.shape, hidden.dtype), jax.ShapeDtypeStruct((v, width), jnp.float32)]
    if bias is not None:
        out_specs.append(pl.BlockSpec((1, 1, columns), lambda i, j, count: (i, 0, j)))
        out_shape.append(jax.ShapeDtypeStruct((n // rows, 1, v), jnp.float32))
    d_hidden, d_weight, *d_bias = pl.pallas_call(
        functools.partial(_backward_body, bias is not None, vocabulary, tiles, options),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(n // rows, v // columns),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[
                pltpu.VMEM((rows, width), jnp.float32),
                pltpu.VMEM((2, columns, width), jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=out_shape,
        compiler_params=_params(tiles, width, hidden.dtype.itemsize, target, backward=True),
        cost_estimate=pl.CostEstimate(
            flops=6 * n * v * width,
            transcendentals=n * v,
            bytes_accessed=(n // rows) * (weight.nbytes + 8 * v * width) + 2 * hidden.nbytes,
        ),
        interpret=target.interpret,
        name="logprob_backward",
    )(count, hidden, weight, *(() if bias is None else (bias,)), targets, packed)
    if bias is not None:
        ran = jnp.arange(n // rows)[:, None] < _active(count, rows)
        return d_hidden, d_weight, jnp.sum(jnp.where(ran, d_bias[0][:, 0, :], 0.0), axis=0)
    return d_hidden, d_weight, None


def _backward_body(has_bias: bool, vocabulary: int, tiles: Tiles, options: tile.Options, count, *refs) -> None:
    hidden, weight, *rest = refs
    bias, rest = (rest[0], rest[1:]) if has_bias else (None, rest)
    targets, packed, d_hidden, d_weight, *rest = rest
    d_bias, rest = (rest[0], rest[1:]) if has_bias else (None, rest)
    sum_hidden, sum_weight, reading, writing = rest
    i, j, column_tiles = pl.program_id(0), pl.program_id(1), pl.num_programs(1)
    active = _active(count, tiles.rows)
    step = i * column_tiles + j
    slot = jax.lax.rem(step, 2)

    def write(step):
        there = d_weight.at[pl.ds(jax.lax.rem(step, column_tiles) * tiles.columns, tiles.columns)]
        slot = jax.lax.rem(step, 2)
        return pltpu.make_async_copy(sum_weight.at[slot], there, writing.at[slot])

    @pl.when(i < active)
    def _():
        there = d_weight.at[pl.ds(j * tiles.columns, tiles.columns)]
        read = pltpu.make_async_copy(there, sum_weight.at[slot], reading.at[slot])

        # A slot is written out before it is filled again: step - 1 waited for step - 2. It also waited for the step
        # that left this tile in HBM, `column_tiles` ago, unless that is step - 1 itself.
        @pl.when((column_tiles == 1) & (i > 0))
        def _():
            write(step - 1).wait()

        @pl.when(i > 0)
        def _():
            read.start()

        raw = _times(hidden[...], weight[...], 1, 1)
        z, slope = tile.logits(raw, None if bias is None else bias[...], options)
        slopes = tile.Slopes(*(packed[:, k : k + 1] for k in range(len(tile.Slopes._fields))))
        d_raw = tile.back(z, slope, _ids(j, z.shape), targets[...], slopes, vocabulary, options)
        if d_bias is not None:
            d_bias[0] = jnp.sum(d_raw, axis=0, keepdims=True)
        narrow = d_raw.astype(hidden.dtype)
        to_hidden = _times(narrow, weight[...], 1, 0)

        @pl.when(j == 0)
        def _():
            sum_hidden[...] = to_hidden

        @pl.when(j > 0)
        def _():
            sum_hidden[...] += to_hidden

        @pl.when(j == column_tiles - 1)
        def _():
            d_hidden[...] = sum_hidden[...].astype(d_hidden.dtype)

        to_weight = _times(narrow, hidden[...], 0, 0)

        @pl.when(i == 0)
        def _():
            sum_weight[slot] = to_weight

        @pl.when(i > 0)
        def _():
            read.wait()
            sum_weight[slot] += to_weight

        @pl.when((step > 0) & (column_tiles > 1))
        def _():
            write(step - 1).wait()

        write(step).start()

        @pl.when(step == active * column_tiles - 1)
        def _():
            write(step).wait()


def _active(count, rows: int):
    """Row tiles with a token that counts; at least one, so that everything is written."""
    # Not //, which compares signs; not every chip can, and here they are known.
    return jnp.maximum(jax.lax.div(count[0] + (rows - 1), rows), 1)


def _ids(j, shape: tuple[int, int]) -> jax.Array:
    return j * shape[1] + jax.lax.broadcasted_iota(jnp.int32, shape, 1)


def _times(a: jax.Array, b: jax.Array, over_a: int, over_b: int) -> jax.Array:
    """A matrix product in float32; float32 operands are not rounded to bfloat16, as the matrix unit otherwise would."""
    dims = ((over_a,), (over_b,)), ((), ())
    return jax.lax.dot_general(a, b, dims, precision=precision_of(a.dtype), preferred_element_type=jnp.float32)


def _params(tiles: Tiles, width: int, itemsize: int, target: Target, *, backward: bool) -> pltpu.CompilerParams:
    # Steps depend on each other through the statistics, the sums and the copies, so no axis is parallel. The compiler's
    # own temporaries come on top of the bytes listed above.
    listed = vmem_bytes(tiles, width, itemsize, backward=backward)
    return pltpu.CompilerParams(
        dimension_semantics=("arbitrary", "arbitrary"),
        vmem_limit_bytes=min(max(listed * 5 // 4 + 4 * MIB, 16 * MIB), target.fast_memory * 15 // 16),
    )
