"""Keys and values of what was read already, so that the next token costs one position."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxalign.models.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Slots [0, index) are filled; a call with T tokens fills the next T of every row.

    One index serves all rows because prompts are padded on the left. What a slot holds is told by its segment id and
    position; an empty slot or padding has segment 0 and is never attended to.
    """

    key: jax.Array  # [L B S Hk K]
    value: jax.Array  # [L B S Hk K]
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
    """Room for `length` tokens in each of `batch_size` rows."""
    shape = config.num_layers, batch_size, length, config.num_kv_heads, config.head_dim
    slots = jnp.zeros((batch_size, length), jnp.int32)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), slots, slots, jnp.zeros((), jnp.int32))
