"""Where parameters live: the mesh, and one table from their paths to PartitionSpecs.

Three mesh axes: `data` (replicas), `fsdp` (parameters, gradients and optimizer state in equal shares, gathered layer by
layer) and `tensor` (heads, hidden units and vocabulary in equal shares). Rows of a batch go over `data` and `fsdp`.

Where activations live, told to a model by whoever owns the mesh. Without a layout a model runs on one device.

Parameters that wait in the hosts' memory, pinned, and are on the devices only while something computes with them.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxalign.mistake import Mistake
from jaxalign.types import PyTree, leaf_names

log = logging.getLogger(__name__)

AXES = ("data", "fsdp", "tensor")

# The first pattern found in a leaf's path decides; optimizer state has the parameter's path at its end, so one table
# serves both. The leading None of a block's leaf is its layer axis. A leaf that no pattern fits is replicated.
# Codes and scales of a quantised kernel lie as the kernel does. An adapter's A [in, r] is cut as the kernel's inputs
# are and its B [r, out] as its outputs are, so that x A and (x A) B are made where x W is; the small r stays whole.
RULES: tuple[tuple[str, P], ...] = (
    (r"embedding$", P("tensor", "fsdp")),
    (r"(query|key|value|gate|up)/kernel(/codes|/scales)?$", P(None, "fsdp", "tensor")),
    (r"(output|down)/kernel(/codes|/scales)?$", P(None, "tensor", "fsdp")),
    (r"(query|key|value|gate|up)/(bias|adapter/magnitude)$", P(None, "tensor")),
    (r"(query|key|value|gate|up)/adapter/a$", P(None, "fsdp", None)),
    (r"(query|key|value|gate|up)/adapter/b$", P(None, None, "tensor")),
    (r"(output|down)/adapter/a$", P(None, "tensor", None)),
    (r"(output|down)/adapter/b$", P(None, None, "fsdp")),
)


def make_mesh(*, data: int = 1, fsdp: int = -1, tensor: int = 1, devices: list | None = None) -> Mesh:
    """A mesh of all devices; one of the three sizes may be -1, which takes what the others leave."""
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    free = [name for name, size in sizes.items() if size == -1]
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    if len(free) > 1 or fixed < 1 or len(devices) % fixed or (not free and fixed != len(devices)):
        raise Mistake(
            f"mesh data={data} fsdp={fsdp} tensor={tensor} does not fill {len(devices)} devices; the product of "
            f"the three must be {len(devices)}, and at most one may be -1 (the rest)"
        )
    for name in free:
        sizes[name] = len(devices) // fixed
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def shardings(tree: PyTree, mesh: Mesh, rules: tuple[tuple[str, P], ...] = RULES) -> PyTree:
    """A NamedSharding for every leaf (arrays or ShapeDtypeStructs) of params, optimizer state or a TrainState.

    A dimension that its mesh axes do not divide is replicated instead, and the log says so once a leaf.
    """

    def place(name: str, leaf: Any) -> NamedSharding:
        spec = next((spec for pattern, spec in rules if re.search(pattern, name)), P())
        if "members" in name.split("/") and spec:
            spec = P(None, *spec)  # an axis of members in front, whole: one step is of all of them
        if len(spec) > leaf.ndim:
            spec = P()
        return NamedSharding(mesh, _divisible(name, leaf.shape, spec, mesh.shape))

    return jax.tree.map(place, leaf_names(tree), tree)


def _divisible(name: str, shape: tuple[int, ...], spec: P, sizes: Mapping[str, int]) -> P:
    axes = []
    for dim, axis in zip(shape, spec, strict=False):
        if axis is not None and dim % sizes[axis]:
            log.warning(
                "%s: %d is not a multiple of the mesh axis %s=%d; replicated there", name, dim, axis, sizes[axis]
            )
            axis = None
        axes.append(axis)
    return P(*axes)


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


HOST = "pinned_host"


def on_host(sharding: Any) -> Any:
    """The same shares of an array in the memory of the hosts of its devices."""
    return sharding.with_memory_kind(HOST)


def offloaded(tree: PyTree) -> PyTree:
    """The arrays in the hosts' memory; those on the devices go with the tree that is given."""
    return jax.tree.map(lambda x: jax.device_put(x, on_host(x.sharding)), tree)


def fetched(tree: PyTree) -> PyTree:
    """The arrays on the devices, beside those on the hosts; inside a jitted function until their last use there."""
    return jax.device_put(tree, jax.memory.Space.Device)
