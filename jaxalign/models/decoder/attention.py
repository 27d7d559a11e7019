"""Attention over packed or padded rows, with one meaning and several implementations.

A query attends to the keys of its own segment at its own or an earlier position, at most window - 1 before it. Segment
0 is padding: it attends to padding, so its rows are finite, and nothing reads them. With `prefix_ids` a query also
attends to that segment, by the same rule: several responses then share a prompt that stands once before them. The
Pallas kernel compares segments for equality only, so it is not used for that.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxalign.kernels.products import precision_of, times
from jaxalign.mistake import Mistake
from jaxalign.models.places import Layout

IMPLEMENTATIONS = ("xla", "splash", "cudnn")
QUERY_BLOCK, MOST_BLOCKS = 64, 8  # of queries, where XLA computes the products
SPLASH_BLOCK, SPLASH_UNIT = 512, 128  # queries and keys of a tile; rows are padded to a multiple of the unit


class Coordinates(NamedTuple):
    """Position and segment of every query, int32 [B T], and of every key, int32 [B S]."""

    positions: jax.Array
    segment_ids: jax.Array
    key_positions: jax.Array
    key_segment_ids: jax.Array
    prefix_ids: jax.Array | None = None  # [B T], the segment that each query sees besides its own; None: no other

    def part(self, queries: slice, keys: slice) -> Coordinates:
        """The coordinates of some queries and some keys."""
        prefix_ids = None if self.prefix_ids is None else self.prefix_ids[:, queries]
        of_keys = self.key_positions[:, keys], self.key_segment_ids[:, keys]
        return Coordinates(self.positions[:, queries], self.segment_ids[:, queries], *of_keys, prefix_ids)

    def visible(self, window: int | None) -> jax.Array:
        """Bool[B T S], True on the keys that each query sees."""
        visible = self.key_segment_ids[:, None, :] == self.segment_ids[:, :, None]
        if self.prefix_ids is not None:
            visible |= self.key_segment_ids[:, None, :] == self.prefix_ids[:, :, None]
        distance = self.positions[:, :, None] - self.key_positions[:, None, :]
        visible &= distance >= 0
        return visible if window is None else visible & (distance < window)


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    coordinates: Coordinates,
    *,
    window: int | None,
    softcap: float | None,
    scale: float,
    implementation: str | None = None,
    layout: Layout | None = None,
) -> jax.Array:
    """softmax(softcap(scale · q kᵀ) over the visible keys) v, softmax in float32.

    Args:
      query: [B T H K].
      key: [B S Hk K], where Hk divides H: each key head serves H / Hk query heads.
      value: [B S Hk K].
      coordinates: positions and segments, which decide the visible keys.
      window: a query sees keys at most window - 1 positions before it; None: no limit.
      softcap: c in c tanh(logit / c), applied before the softmax; None: no soft-cap.
      scale: factor of the logits.
      implementation: "xla" runs anywhere, with float32 logits [B H T S], in blocks of queries for long rows. "splash"
        (Pallas, TPU) holds no array of T S entries. "cudnn" (GPU, half precision) holds none a head: it takes the
        visible keys as a bias [B 1 T S] of 2 bytes an entry, and returns the bias's gradient, as large. So 8 rows of
        8,192 tokens cost 1 GiB a layer forward and 2 GiB backward, where 32 heads of float32 logits would cost 64 GiB.
        None picks by `choose`.
      layout: the mesh that cuts rows and heads; only "splash" reads it.

    Returns:
      [B T H K].
    """
    shared = coordinates.prefix_ids is not None
    if implementation == "splash" and shared:
        raise Mistake(
            "splash attention cannot share a prompt: its mask only compares segments for equality; use xla or cudnn"
        )
    implementation = implementation or choose(query, key, softcap, platform=jax.default_backend())
    if implementation == "splash" and not shared:
        return _splash(query, key, value, coordinates.segment_ids, window, softcap, scale, layout)

    def mix(queries: slice, keys: slice) -> jax.Array:
        visible = coordinates.part(queries, keys).visible(window)[:, None]  # the same for every head
        operands = query[:, queries], key[:, keys], value[:, keys]
        if softcap is not None:
            return _capped(*operands, visible, softcap, scale)
        library = "cudnn" if implementation == "cudnn" else "xla"
        with _exact(query.dtype):
            return jax.nn.dot_product_attention(*operands, mask=visible, scale=scale, implementation=library)

    length = query.shape[1]
    block = max(QUERY_BLOCK, -(-length // MOST_BLOCKS))
    if implementation == "cudnn" or length != key.shape[1] or length <= block:
        return mix(slice(None), slice(None))
    # A query sees no key that stands after it: a block of queries needs the keys up to its own end, on average half.
    starts = range(0, length, block)
    return jnp.concatenate([mix(slice(at, at + block), slice(0, at + block)) for at in starts], axis=1)


def attention_of_one(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    coordinates: Coordinates,
    *,
    window: int | None,
    softcap: float | None,
    scale: float,
) -> jax.Array:
    """`attention` of one query a row, [B 1 H K], on keys and values [B Hk S K], which are read once, in order."""
    batch, _, heads, width = query.shape
    # With a query head for each key head the product has no matrix in it: the axis of groups is left out.
    shared = heads > key.shape[1]
    groups = query.reshape((batch, key.shape[1], heads // key.shape[1], width) if shared else (batch, heads, width))
    to_logits, to_values = ("bkgd,bksd->bkgs", "bkgs,bksd->bkgd") if shared else ("bkd,bksd->bks", "bks,bksd->bkd")
    logits = scale * times(to_logits, groups, key)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    visible = coordinates.visible(window)
    visible = visible.reshape(batch, *(1,) * (logits.ndim - 2), -1)
    logits = jnp.where(visible, logits, -0.7 * jnp.finfo(jnp.float32).max)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    mixed = times(to_values, weights, value)
    return mixed.astype(query.dtype).reshape(query.shape)


def choose(query: jax.Array, key: jax.Array, softcap: float | None, *, platform: str) -> str:
    """Splash on TPU for whole rows of at least 128 tokens; cuDNN on GPU in half precision, uncapped; else XLA."""
    length = query.shape[1]
    if platform == "tpu" and length == key.shape[1] and length >= SPLASH_UNIT and query.shape[3] % 64 == 0:
        return "splash"
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    if platform == "gpu" and half and softcap is None and length > 1 and query.shape[3] % 8 == 0:
        return "cudnn"
    return "xla"


def _capped(
    query: jax.Array, key: jax.Array, value: jax.Array, visible: jax.Array, softcap: float, scale: float
) -> jax.Array:
    """Attention in full, for the soft-cap that `jax.nn.dot_product_attention` does not have."""
    batch, length, heads, width = query.shape
    groups = query.reshape(batch, length, key.shape[2], heads // key.shape[2], width)
    logits = scale * times("btkgd,bskd->bkgts", groups, key)
    logits = softcap * jnp.tanh(logits / softcap)
    logits = jnp.where(visible[:, :, None], logits, -0.7 * jnp.finfo(jnp.float32).max)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    mixed = jnp.einsum("bkgts,bskd->btkgd", weights, value, precision=precision_of(value.dtype))
    return mixed.reshape(query.shape)


def _splash(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array,
    window: int | None,
    softcap: float | None,
    scale: float,
    layout: Layout | None,
) -> jax.Array:
    """The Pallas kernel of jax.experimental, with a causal or local mask by index.

    Within a segment, index order is position order, so with segment ids it is exact for packed and padded rows alike.
    Rows are padded to a multiple of SPLASH_UNIT tokens, and their number to one of the devices that cut them.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    rows, tokens = query.shape[:2]
    parts = 1 if layout is None else math.prod(layout.mesh.shape[axis] for axis in layout.rows)
    padding = -rows % parts, -tokens % SPLASH_UNIT
    arrays = tuple(_padded(x, padding) for x in (query, key, value, segment_ids))
    length = tokens + padding[1]
    block = min(SPLASH_BLOCK, length)
    while length % block:
        block //= 2
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    shape = (length, length)
    mask = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), offset=0)

    def local(query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array) -> jax.Array:
        kernel = splash.make_splash_mha(
            masks.MultiHeadMask([mask] * query.shape[2]),
            head_shards=1,
            q_seq_shards=1,
            block_sizes=sizes,
            attn_logits_soft_cap=softcap,
        )

        def of_row(query: jax.Array, key: jax.Array, value: jax.Array, ids: jax.Array) -> jax.Array:
            return kernel(query, key, value, segment_ids=splash.SegmentIds(q=ids, kv=ids))

        scaled = (query * scale).astype(query.dtype)
        heads_first = (jnp.swapaxes(x, 1, 2) for x in (scaled, key, value))
        return jnp.swapaxes(jax.vmap(of_row)(*heads_first, segment_ids), 1, 2)

    if layout is not None:
        cut = key.shape[2] % layout.mesh.shape[layout.heads] == 0
        heads = P(layout.rows, None, layout.heads if cut else None, None)
        specs = (heads, heads, heads, P(layout.rows, None))
        local = jax.shard_map(local, mesh=layout.mesh, in_specs=specs, out_specs=heads, check_vma=False)
    return _exactly(local, *arrays)[:rows, :tokens]


def _exact(dtype: jnp.dtype) -> AbstractContextManager:
    """The context in which a library's products, which name no precision, have that of their dtype."""
    return jax.default_matmul_precision("highest") if precision_of(dtype) else contextlib.nullcontext()


def _exactly(function: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """function(*arrays) in `_exact` of their dtype, and its backward pass too, which is traced outside of a context."""
    if precision_of(arrays[0].dtype) is None:
        return function(*arrays)

    @jax.custom_vjp
    def exact(*arrays: jax.Array) -> jax.Array:
        with _exact(jnp.float32):
            return function(*arrays)

    def forward(*arrays: jax.Array) -> tuple[jax.Array, Callable]:
        with _exact(jnp.float32):
            return jax.vjp(function, *arrays)

    def backward(pullback: Callable, slope: jax.Array) -> tuple:
        with _exact(jnp.float32):
            return pullback(slope)

    exact.defvjp(forward, backward)
    return exact(*arrays)


def _padded(x: jax.Array, padding: tuple[int, int]) -> jax.Array:
    """x [B T ...] with further rows and tokens of zeros; segment 0 is padding."""
    widths = [(0, more) for more in padding] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, widths) if any(padding) else x
