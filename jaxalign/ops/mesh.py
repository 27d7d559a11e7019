"""What an op must know of devices before it calls a kernel: which body runs there, and how the mesh cuts rows."""

from __future__ import annotations

import math

from jax.sharding import Mesh

from jaxalign.kernels.runtime import Target, interpreted, target_of
from jaxalign.mistake import Mistake


def kernel_target(mesh: Mesh | None) -> Target:
    """The chip of the mesh, or of jax's default devices. Where there is none the TPU's body is interpreted: a test."""
    target = target_of(None if mesh is None else list(mesh.devices.flat))
    return interpreted() if target.body == "cpu" else target


def row_axes(mesh: Mesh, axes: tuple[str, ...], rows: int) -> tuple[str, ...]:
    """Those of `axes` that the mesh has; raises ValueError unless they cut `rows` into equal parts."""
    axes = tuple(axis for axis in axes if axis in mesh.shape)
    devices = math.prod(mesh.shape[axis] for axis in axes)
    if rows % devices:
        raise Mistake(f"{rows} rows cannot be cut over the {devices} devices of the mesh axes {axes}")
    return axes
