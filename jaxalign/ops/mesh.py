"""Devices as an op needs them before it calls a kernel: the body that runs there, and the cut of rows over the mesh."""

from __future__ import annotations

import math

from jax.sharding import Mesh

from jaxalign.kernels.runtime import Target, interpreted, target_of
from jaxalign.mistake import Mistake


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
