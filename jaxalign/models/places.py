"""Places of arrays: the mesh, the PartitionSpec of every leaf of a train state, activations, and the hosts' memory.

The mesh has three axes: `data` (replicas), `fsdp` (parameters, gradients and optimizer state in equal shares, gathered
layer by layer) and `tensor` (heads, hidden units and vocabulary in equal shares). Rows of a batch are cut over `data`
and `fsdp`, and between blocks their tokens over `tensor`. `RULES` maps a leaf's path to its PartitionSpec; `Layout`
gives activations theirs; `offloaded` and `fetched` move frozen parameters to the hosts' pinned memory, and to the
devices while something computes with them.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxalign.mistake import Mistake
from jaxalign.types import PyTree, leaf_names

log = logging.getLogger(__name__)

AXES = ("data", "fsdp", "tensor")
STACKS = ("blocks", "members")  # trees whose leaves are stacked, on an axis of layers or of members in front

# The first pattern found in a leaf's path decides. Optimizer state has the parameter's path at its end, so one table
# serves both. The leading None of a block's leaf is its layer axis; P() is a copy on every device.
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
    (r"(output|down)/(bias|adapter/magnitude)$", P()),
    (r"norm/(scale|bias)$", P()),
    (r"(^|/)head$", P()),  # of a reward model [M D] or a critic [1 D]
    (r"(^|critic/)bias$", P()),  # of a critic [1]
    (r"^(mean|std)$", P()),  # of a reward model's scores [M]
    (r"(^|/)(step|count|key)$", P()),  # of the train state and the optimizer
    (r"^carry/", P()),  # scalars that the algorithm remembers
)


def make_mesh(*, data: int = 1, fsdp: int = -1, tensor: int = 1, devices: list | None = None) -> Mesh:
    """A mesh of all devices; one of the three sizes may be -1: the devices that the other two leave.

    An axis follows axes of the slice's torus. Where no such axes have its size, it follows a part of one: tensor=2 on
    v5p:4x4x4, for example.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    free = [name for name, size in sizes.items() if size == -1]
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    if len(free) > 1 or fixed < 1 or len(devices) % fixed or (not free and fixed != len(devices)):
        raise Mistake(
            f"`mesh.data` {data} x `mesh.fsdp` {fsdp} x `mesh.tensor` {tensor} does not fill {len(devices)} devices; "
            f"the product must be {len(devices)}, and at most one may be -1 (the rest)"
        )
    for name in free:
        sizes[name] = len(devices) // fixed
    shape, types = tuple(sizes.values()), (AxisType.Auto,) * 3
    try:
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
    except NotImplementedError:  # an axis that needs a part of a physical one
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(grid, AXES, axis_types=types)


MOST_TENSOR = 8  # shares of a token's products in generation; each layer adds up their outputs twice


def decoding_tensor(devices: int, key_heads: int) -> int:
    """The largest number of shares that generation cuts a model into: it divides devices and key heads; at most 8."""
    return max(n for n in range(1, MOST_TENSOR + 1) if devices % n == 0 and key_heads % n == 0)


def inference_mesh(
    key_heads: int, *, data: int | None = None, fsdp: int = 1, tensor: int | None = None, devices: list | None = None
) -> Mesh:
    """A mesh of all devices to generate on. `tensor` is as `decoding_tensor` has it, `data` the rest, unless given."""
    count = len(jax.devices() if devices is None else devices)
    if tensor is None:
        fixed = math.prod(n for n in (data, fsdp) if n not in (None, -1))
        left = max(count // fixed, 1) if fixed > 0 else 1
        fills = data not in (None, -1) and fsdp != -1  # nothing else is free to take the rest
        tensor = left if fills else decoding_tensor(left, key_heads)
    if data is None:
        data = 1 if -1 in (fsdp, tensor) else -1
    return make_mesh(data=data, fsdp=fsdp, tensor=tensor, devices=devices)


def decoding_mesh(mesh: Mesh, key_heads: int) -> Mesh:
    """The devices of a mesh for training, in the same order, with `tensor` as large as generation can use.

    A token reads every weight once, whatever the number of rows: the more devices share them, the faster it is.
    """
    tensor = decoding_tensor(mesh.size, key_heads)
    if tensor <= mesh.shape["tensor"]:
        return mesh
    return Mesh(mesh.devices.reshape(mesh.size // tensor, 1, tensor), AXES, axis_types=mesh.axis_types)


def device_bytes(tree: PyTree) -> int:
    """Bytes that a device holds of the leaves that lie on devices: arrays, or ShapeDtypeStructs with shardings."""
    leaves = [x for x in jax.tree.leaves(tree) if x.sharding.memory_kind != HOST]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def shardings(tree: PyTree, mesh: Mesh) -> PyTree:
    """A NamedSharding for every leaf (arrays or ShapeDtypeStructs) of params, optimizer state or a TrainState.

    A dimension that its mesh axes do not divide is replicated instead, which is logged. A vector or scalar that no rule
    fits is replicated.

    Raises:
      Mistake: a matrix that no rule fits.
    """

    def place(name: str, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, _divisible(name, leaf.shape, _spec(name, leaf.shape), mesh.shape))

    return jax.tree.map(place, leaf_names(tree), tree)


def _spec(name: str, shape: tuple[int, ...]) -> P:
    spec = next((spec for pattern, spec in RULES if re.search(pattern, name)), None)
    stacks = [stack for stack in STACKS if stack in name.split("/")]
    if spec and "members" in stacks:
        spec = P(None, *spec)  # the axis of members is whole: one step is of all of them
    if spec is not None and len(spec) <= len(shape):
        return spec
    if len(shape) - len(stacks) >= 2:
        raise Mistake(
            f"no rule says how the matrix {name} {list(shape)} is cut over the mesh; add a line with a pattern of its "
            "name and a PartitionSpec to `RULES` in jaxalign/models/places.py (P() keeps a copy on every device)"
        )
    return P()


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
    """Places of activations: the mesh, and its axes that cut rows and heads. Hashable, so it can be static.

    Whoever owns the mesh hands it to the model; a model without one runs on one device.
    """

    mesh: Mesh
    rows: tuple[str, ...] = ("data", "fsdp")
    heads: str = "tensor"

    def tokens(self, length: int) -> str | None:
        """The axis that cuts the tokens of rows between blocks, where it divides them."""
        size = self.mesh.shape[self.heads]
        return self.heads if size > 1 and length % size == 0 else None

    def whole(self, x: jax.Array) -> jax.Array:
        """[B T D] with rows cut and width whole: so weights, not activations, travel under fsdp."""
        return self._constrained(x, None)

    def cut(self, x: jax.Array) -> jax.Array:
        """`whole` with tokens cut over the axis of heads too, if it divides them (sequence parallelism).

        Reference: Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198, section 4.2.
        """
        return self._constrained(x, self.tokens(x.shape[1]))

    def of_kernel(self, shape: tuple[int, int], *, inputs: bool) -> NamedSharding:
        """Place of a kernel [I O] while products use it: I or O is cut over heads, and nothing over rows."""
        size = self.mesh.shape[self.heads]
        axis = self.heads if shape[0 if inputs else 1] % size == 0 else None
        return NamedSharding(self.mesh, P(axis, None) if inputs else P(None, axis))

    def _constrained(self, x: jax.Array, tokens: str | None) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, P(self.rows, tokens, None)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gathered(layout: Layout, x: jax.Array) -> jax.Array:
    """`layout.whole` of hidden states that are cut; the gradient's shares are summed as it is cut again."""
    return layout.whole(x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scattered(layout: Layout, x: jax.Array) -> jax.Array:
    """`layout.cut` of hidden states whose shares are summed as they are cut; the gradient is gathered."""
    return layout.cut(x)


gathered.defvjp(lambda layout, x: (layout.whole(x), None), lambda layout, _, g: (layout.cut(g),))
scattered.defvjp(lambda layout, x: (layout.cut(x), None), lambda layout, _, g: (layout.whole(g),))


HOST = "pinned_host"


def on_host(sharding: Any) -> Any:
    """The same shares of an array, in the memory of the hosts of its devices."""
    return sharding.with_memory_kind(HOST)


def offloaded(tree: PyTree) -> PyTree:
    """Copies of the arrays in the hosts' memory; the device arrays are freed with `tree`."""
    return jax.tree.map(lambda x: jax.device_put(x, on_host(x.sharding)), tree)


def fetched(tree: PyTree) -> PyTree:
    """Copies of the arrays on the devices; a jitted function frees them after their last use."""
    return jax.device_put(tree, jax.memory.Space.Device)


def placed(tree: PyTree, mesh: Mesh, *, offload: bool = False) -> PyTree:
    """The tree as ShapeDtypeStructs that carry their shardings; with `offload` in host memory."""

    def struct(x: Any, place: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_host(place) if offload else place)

    return jax.tree.map(struct, tree, shardings(tree, mesh))
