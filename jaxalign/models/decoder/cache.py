"""Keys and values of what was read already, so that the next token costs one position."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxalign.models.decoder.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """One layer's keys and values; with int8, codes and one float32 scale a head and slot."""

    key: jax.Array  # [B Hk S K]
    value: jax.Array  # [B Hk S K]
    key_scale: jax.Array | None = None  # Float32[B Hk S 1]
    value_scale: jax.Array | None = None

    def write(self, index: jax.Array, key: jax.Array, value: jax.Array) -> LayerCache:
        """With T more slots filled, from `index` on; key and value [B T Hk K]."""
        parts = {"key": key, "value": value}
        found = {}
        for name, new in parts.items():
            new = jnp.swapaxes(new, 1, 2)
            if self.key_scale is not None:
                new, scale = _codes(new)
                found[f"{name}_scale"] = _put(getattr(self, f"{name}_scale"), scale, index)
            found[name] = _put(getattr(self, name), new, index)
        return LayerCache(**found)

    def read(self, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        """All keys and values [B Hk S K]."""
        if self.key_scale is None or self.value_scale is None:
            return self.key.astype(dtype), self.value.astype(dtype)
        widen = lambda codes, scale: (codes.astype(jnp.float32) * scale).astype(dtype)  # noqa: E731
        return widen(self.key, self.key_scale), widen(self.value, self.value_scale)


def _codes(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x to within half a step of max|x| / 127 over its last axis."""
    wide = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(wide), axis=-1, keepdims=True), 1e-30) / 127.0
    return jnp.round(wide / scale).astype(jnp.int8), scale


def _put(held: jax.Array, new: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(held, new.astype(held.dtype), (0, 0, index, 0))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """A call with T tokens fills the T slots of every row from `index` on.

    One index serves all rows. What a slot holds is told by its segment id and position, so the order of slots means
    nothing; an empty slot or padding has segment 0 and is never attended to.
    """

    layers: tuple[LayerCache, ...]
    positions: jax.Array  # Int32[B S]
    segment_ids: jax.Array  # Int32[B S]
    index: jax.Array  # Int32[]

    def place(self, positions: jax.Array, segment_ids: jax.Array) -> Cache:
        """With the positions and segments of the next T tokens written; keys and values follow layer by layer."""
        write = lambda held, new: jax.lax.dynamic_update_slice(held, new, (0, self.index))  # noqa: E731
        return dataclasses.replace(
            self,
            positions=write(self.positions, positions.astype(jnp.int32)),
            segment_ids=write(self.segment_ids, segment_ids.astype(jnp.int32)),
        )


def empty_cache(config: ModelConfig, batch_size: int, length: int, dtype: jnp.dtype = jnp.float32) -> Cache:
    """Room for `length` tokens in each of `batch_size` rows; int8 holds codes, to within 0.4% of a head's largest."""
    shape = batch_size, config.num_kv_heads, length, config.head_dim
    coded = jnp.dtype(dtype) == jnp.int8
    # an array each: a buffer that is donated cannot be donated twice
    scale = lambda: jnp.zeros((*shape[:3], 1), jnp.float32) if coded else None  # noqa: E731
    layer = lambda: LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), scale(), scale())  # noqa: E731
    slots = lambda: jnp.zeros((batch_size, length), jnp.int32)  # noqa: E731
    return Cache(tuple(layer() for _ in range(config.num_layers)), slots(), slots(), jnp.zeros((), jnp.int32))
