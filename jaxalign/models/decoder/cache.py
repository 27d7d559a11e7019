"""Keys and values of the tokens read so far, so that the next token costs one position."""

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
        """The cache with T more slots filled, from `index` on; key and value [B T Hk K]."""
        filled = {}
        for name, new in {"key": key, "value": value}.items():
            new = jnp.swapaxes(new, 1, 2)
            if self.key_scale is not None:
                new, scale = _codes(new)
                filled[f"{name}_scale"] = _put(getattr(self, f"{name}_scale"), scale, index)
            filled[name] = _put(getattr(self, name), new, index)
        return LayerCache(**filled)

    def read(self, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        """All keys and values [B Hk S K]."""
        if self.key_scale is None or self.value_scale is None:
            return self.key.astype(dtype), self.value.astype(dtype)
        coded = (self.key, self.key_scale), (self.value, self.value_scale)
        key, value = ((codes.astype(jnp.float32) * scale).astype(dtype) for codes, scale in coded)
        return key, value


def _codes(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Int8 codes and scales: code · scale is x to within half a step of max|x| / 127 over the last axis."""
    wide = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(wide), axis=-1, keepdims=True), 1e-30) / 127.0
    return jnp.round(wide / scale).astype(jnp.int8), scale


def _put(slots: jax.Array, new: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(slots, new.astype(slots.dtype), (0, 0, index, 0))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Slots for keys and values; a call with T tokens fills the T slots of every row from `index` on.

    One index serves all rows. A slot is attended to by its segment id and position, so the order of slots means
    nothing; an empty slot or padding has segment 0 and is never attended to.
    """

    layers: tuple[LayerCache, ...]
    positions: jax.Array  # Int32[B S]
    segment_ids: jax.Array  # Int32[B S]
    index: jax.Array  # Int32[]

    def place(self, positions: jax.Array, segment_ids: jax.Array) -> Cache:
        """The cache with positions and segments of the next T tokens; keys and values follow layer by layer."""
        start = (0, self.index)
        return dataclasses.replace(
            self,
            positions=jax.lax.dynamic_update_slice(self.positions, positions.astype(jnp.int32), start),
            segment_ids=jax.lax.dynamic_update_slice(self.segment_ids, segment_ids.astype(jnp.int32), start),
        )


def empty_cache(config: ModelConfig, batch_size: int, length: int, dtype: jnp.dtype = jnp.float32) -> Cache:
    """Room for `length` tokens in each of `batch_size` rows; int8 codes are off by 0.4% of a head's largest at most."""
    shape = batch_size, config.num_kv_heads, length, config.head_dim

    # Every field is an array of its own: a donated buffer cannot be donated twice.
    def layer() -> LayerCache:
        scales = [jnp.zeros((*shape[:3], 1), jnp.float32) for _ in range(2 if jnp.dtype(dtype) == jnp.int8 else 0)]
        return LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), *scales)

    positions, segment_ids = (jnp.zeros((batch_size, length), jnp.int32) for _ in range(2))
    layers = tuple(layer() for _ in range(config.num_layers))
    return Cache(layers, positions, segment_ids, jnp.zeros((), jnp.int32))
