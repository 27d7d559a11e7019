"""Devices as an op needs them: the body of a kernel that runs there, and the cut of tokens and weights over a mesh."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxalign.kernels.runtime import Target, interpreted, target_of
from jaxalign.mistake import Mistake


class Shards(NamedTuple):
    """The mesh, its axes that cut tokens, and the one that cuts the vocabulary. Hashable, so it can be static."""

    mesh: Mesh
    rows: tuple[str, ...] = ("data", "fsdp")  # the last of them also cuts the width of the weight
    vocabulary: str | None = "tensor"

    def axis(self, vocabulary: int) -> str | None:
        """The axis over which a vocabulary of this size is cut; None if it is whole on every device."""
        size = 1 if self.vocabulary is None else self.mesh.shape[self.vocabulary]
        return self.vocabulary if size > 1 and vocabulary % size == 0 else None

    def local(self, tokens: int, vocabulary: int) -> tuple[int, int] | None:
        """(tokens, vocabulary) of a device; None if the tokens cannot be cut into equal parts."""
        parts = 1
        for name in self.rows:
            parts *= self.mesh.shape[name]
        if tokens % parts:
            return None
        axis = self.axis(vocabulary)
        return tokens // parts, vocabulary // (1 if axis is None else self.mesh.shape[axis])

    def of_weight(self, shape: tuple[int, ...]) -> P:
        """Place of a weight [V D] and its gradient; a dimension that its axis does not divide is whole."""
        last = self.rows[-1]
        return P(self.axis(shape[0]), last if shape[1] % self.mesh.shape[last] == 0 else None)

    def summed(self, gradient: jax.Array, place: P) -> jax.Array:
        """Sum over the tokens' shards of the gradient [V D] of a weight, where `shard_map` runs; each its share of D.

        Args:
          gradient: of this shard of the vocabulary and these tokens, whole in D.
          place: `of_weight`.
        """
        if place[1] is None:
            return jax.lax.psum(gradient, self.rows)
        scattered = jax.lax.psum_scatter(gradient, place[1], scatter_dimension=1, tiled=True)
        return jax.lax.psum(scattered, self.rows[:-1])


def kernel_target(mesh: Mesh | None) -> Target:
    """The chip of the mesh, or of jax's default devices; on a CPU, for tests, the TPU's body interpreted."""
    target = target_of(None if mesh is None else list(mesh.devices.flat))
    return interpreted() if target.body == "cpu" else target


def row_axes(mesh: Mesh, axes: tuple[str, ...], rows: int) -> tuple[str, ...]:
    """Those of `axes` that the mesh has; raises Mistake unless they cut `rows` into equal parts."""
    axes = tuple(axis for axis in axes if axis in mesh.shape)
    devices = math.prod(mesh.shape[axis] for axis in axes)
    if rows % devices:
        raise Mistake(
            f"{rows} rows cannot be cut over the {devices} devices of the mesh axes {axes}; take a "
            f"multiple of {devices}"
        )
    return axes
