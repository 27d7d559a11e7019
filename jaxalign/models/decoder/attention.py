"""Attention over packed or padded rows, with one meaning and several implementations.

A query attends to the keys of its own segment at its own or an earlier position, at most window - 1 before it. Segment
0 is padding: it attends to padding, so its rows are finite, and no one looks at them. Where `prefix_ids` are given, a
query also attends to that segment, by the same rule: several responses then share a prompt that stands once before
them. The Pallas kernel knows equal segments only, so it is not used for that.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxalign.mistake import Mistake
from jaxalign.models.places import Layout

IMPLEMENTATIONS = ("xla", "splash", "cudnn")
QUERY_BLOCK, MOST_BLOCKS = 64, 8  # of queries, where XLA computes the products
SPLASH_BLOCK = 512  # queries and keys of a tile; smaller when the row is


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    positions: jax.Array,
    segment_ids: jax.Array,
    key_positions: jax.Array,
    key_segment_ids: jax.Array,
    window: int | None,
    softcap: float | None,
    scale: float,
    prefix_ids: jax.Array | None = None,
    implementation: str | None = None,
    layout: Layout | None = None,
) -> jax.Array:
    """softmax(softcap(scale · q kᵀ) over the visible keys) v, softmax in float32.

    Args:
      query: [B T H K].
      key: [B S Hk K], where Hk divides H: each key head serves H / Hk query heads.
      value: [B S Hk K].
      positions: Int32[B T].
      segment_ids: Int32[B T].
      key_positions: Int32[B S].
      key_segment_ids: Int32[B S].
      window: keys further than window - 1 before the query are not seen; None: no limit.
      softcap: c tanh(logit / c) before the softmax; None: not.
      scale: of the logits.
      prefix_ids: Int32[B T], the segment that each query sees besides its own; None: no other.
      implementation: "xla" runs anywhere; "splash" (Pallas, TPU) and "cudnn" (GPU, half precision) never hold the
        [T, S] matrix; None picks by `choose`.
      layout: rows and heads are cut by this mesh; only "splash" needs to know.

    Returns:
      [B T H K].
    """
    if implementation == "splash" and prefix_ids is not None:
        raise Mistake("splash attention cannot share a prompt: its mask knows equal segments only; use xla or cudnn")
    implementation = implementation or choose(query, key, softcap, platform=jax.default_backend())
    if implementation == "splash" and prefix_ids is None:
        return _splash(query, key, value, segment_ids, window, softcap, scale, layout)

    def of_rows(rows: slice, keys: slice) -> jax.Array:
        ids = positions[:, rows], segment_ids[:, rows], key_positions[:, keys], key_segment_ids[:, keys]
        visible = _visible(*ids, window, None if prefix_ids is None else prefix_ids[:, rows])[:, None]  # for every head
        given = query[:, rows], key[:, keys], value[:, keys]
        if softcap is not None:
            return _capped(*given, visible, softcap, scale)
        library = "cudnn" if implementation == "cudnn" else "xla"
        return jax.nn.dot_product_attention(*given, mask=visible, scale=scale, implementation=library)

    length = query.shape[1]
    block = max(QUERY_BLOCK, -(-length // MOST_BLOCKS))
    if implementation == "cudnn" or length != key.shape[1] or length <= block:
        return of_rows(slice(None), slice(None))
    # No key stands behind the queries that see it: a block of queries needs the keys up to its own end, half of all.
    starts = range(0, length, block)
    return jnp.concatenate([of_rows(slice(at, at + block), slice(0, at + block)) for at in starts], axis=1)


def _visible(
    positions: jax.Array,
    segment_ids: jax.Array,
    key_positions: jax.Array,
    key_segment_ids: jax.Array,
    window: int | None,
    prefix_ids: jax.Array | None,
) -> jax.Array:
    """Bool[B T S], which keys each query sees."""
    visible = key_segment_ids[:, None, :] == segment_ids[:, :, None]
    if prefix_ids is not None:
        visible |= key_segment_ids[:, None, :] == prefix_ids[:, :, None]
    distance = positions[:, :, None] - key_positions[:, None, :]
    visible &= distance >= 0
    return visible if window is None else visible & (distance < window)


def attention_of_one(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    positions: jax.Array,
    segment_ids: jax.Array,
    key_positions: jax.Array,
    key_segment_ids: jax.Array,
    window: int | None,
    prefix_ids: jax.Array | None = None,
    softcap: float | None,
    scale: float,
) -> jax.Array:
    """`attention` of one query a row, [B 1 H K], on keys and values [B Hk S K], which are read once, in order."""
    batch, _, heads, width = query.shape
    # With a query head for each key head there is no matrix in the product, and XLA is told so.
    shared = heads > key.shape[1]
    groups = query.reshape((batch, key.shape[1], heads // key.shape[1], width) if shared else (batch, heads, width))
    to_logits, to_values = ("bkgd,bksd->bkgs", "bkgs,bksd->bkgd") if shared else ("bkd,bksd->bks", "bks,bksd->bkd")
    logits = scale * jnp.einsum(to_logits, groups, key, preferred_element_type=jnp.float32)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    visible = _visible(positions, segment_ids, key_positions, key_segment_ids, window, prefix_ids)
    visible = visible.reshape(batch, *(1,) * (logits.ndim - 2), -1)
    logits = jnp.where(visible, logits, -0.7 * jnp.finfo(jnp.float32).max)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    mixed = jnp.einsum(to_values, weights, value, preferred_element_type=jnp.float32)
    return mixed.astype(query.dtype).reshape(query.shape)


def choose(query: jax.Array, key: jax.Array, softcap: float | None, *, platform: str) -> str:
    """Splash on TPU for whole rows of a multiple of 128 tokens; cuDNN on GPU in half precision, uncapped; else XLA."""
    length = query.shape[1]
    if platform == "tpu" and length == key.shape[1] and length % 128 == 0 and query.shape[3] % 64 == 0:
        return "splash"
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    if platform == "gpu" and half and softcap is None and length > 1 and query.shape[3] % 8 == 0:
        return "cudnn"
    return "xla"


def _capped(
    query: jax.Array, key: jax.Array, value: jax.Array, visible: jax.Array, softcap: float, scale: float
) -> jax.Array:
    """`jax.nn.dot_product_attention` has no soft-cap, so here it is in full."""
    batch, length, heads, width = query.shape
    groups = query.reshape(batch, length, key.shape[2], heads // key.shape[2], width)
    logits = scale * jnp.einsum("btkgd,bskd->bkgts", groups, key, preferred_element_type=jnp.float32)
    logits = softcap * jnp.tanh(logits / softcap)
    logits = jnp.where(visible[:, :, None], logits, -0.7 * jnp.finfo(jnp.float32).max)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weights, value).reshape(query.shape)


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
    """The Pallas kernel of jax.experimental. Within a row, index order is position order inside every segment, so a
    causal or local mask by index, with segment ids, is exact for packed and padded rows alike.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length = query.shape[1]
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
    one = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), offset=0)

    def local(query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array) -> jax.Array:
        kernel = splash.make_splash_mha(
            masks.MultiHeadMask([one] * query.shape[2]),
            head_shards=1,
            q_seq_shards=1,
            block_sizes=sizes,
            attn_logits_soft_cap=softcap,
        )
        heads_first = lambda x: jnp.swapaxes(x, 1, 2)  # noqa: E731
        run = lambda q, k, v, ids: kernel(q, k, v, segment_ids=splash.SegmentIds(q=ids, kv=ids))  # noqa: E731
        scaled = (query * scale).astype(query.dtype)
        return heads_first(jax.vmap(run)(*map(heads_first, (scaled, key, value)), segment_ids))

    if layout is None:
        return local(query, key, value, segment_ids)
    cut = key.shape[2] % layout.mesh.shape[layout.heads] == 0
    heads = P(layout.rows, None, layout.heads if cut else None, None)
    specs = (heads, heads, heads, P(layout.rows, None))
    return jax.shard_map(local, mesh=layout.mesh, in_specs=specs, out_specs=heads, check_vma=False)(
        query, key, value, segment_ids
    )
