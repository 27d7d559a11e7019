"""Where activations live, told to a model by whoever owns the mesh. Without a layout a model runs on one device."""

from __future__ import annotations

import dataclasses

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


@dataclasses.dataclass(frozen=True)
class Layout:
    """The mesh, and its axes that cut rows and heads. Hashable, so it can be static."""

    mesh: Mesh
    rows: tuple[str, ...] = ("data", "fsdp")
    heads: str = "tensor"

    def constrain_hidden(self, x: jax.Array) -> jax.Array:
        """[B T D] with rows cut and width whole: so weights, not activations, travel under fsdp."""
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, P(self.rows, None, None)))

    def constrain_heads(self, x: jax.Array) -> jax.Array:
        """[B T H K] with rows and heads cut, where the mesh divides the heads."""
        heads = self.heads if x.shape[2] % self.mesh.shape[self.heads] == 0 else None
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, P(self.rows, None, heads, None)))
