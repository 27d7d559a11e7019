"""The target of a kernel: the kind of chip, its fast memory, and whether the kernel is interpreted instead.

Everything is decided in Python from the devices of the program, before tracing, and not from the devices of this
process, so a program can be compiled for absent chips.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

MIB = 2**20


class Target(NamedTuple):
    """A chip to build a kernel for. Hashable, so it can be static."""

    body: str  # "tpu": Mosaic; "gpu": Triton; "cpu": no kernel of its own
    fast_memory: int  # bytes of VMEM of a TensorCore, or of shared memory that a block may use
    interpret: bool = False  # evaluated by XLA on any platform: slow, for tests


# VMEM of a TensorCore, by jax's name of the chip: the numbers of jax's Pallas guide for TPUs.
VMEM = {
    "TPU v4": 16 * MIB,
    "TPU v5 lite": 128 * MIB,  # v5e
    "TPU v5": 64 * MIB,  # v5p
    "TPU v5p": 64 * MIB,
    "TPU v6 lite": 128 * MIB,  # v6e
    "TPU7x": 64 * MIB,
}
SMALLEST_VMEM = 16 * MIB
SHARED_MEMORY = 227 * 1024  # compute capability 9.0: H100, H200


def target_of(devices: Sequence[Any] | None = None) -> Target:
    """The target of a program that runs on `devices`, by default jax's own."""
    device = (jax.devices() if devices is None else devices)[0]
    if device.platform == "tpu":
        return Target("tpu", VMEM.get(device.device_kind, SMALLEST_VMEM))
    if device.platform in ("gpu", "cuda"):
        return Target("gpu", SHARED_MEMORY)
    return Target("cpu", 0)


def interpreted(body: str = "tpu", *, fast_memory: int = 64 * MIB) -> Target:
    """A target whose programs XLA evaluates on the CPU: the values of the real kernel, at a fraction of its speed."""
    return Target(body, fast_memory, interpret=True)


def up(n: int, unit: int) -> int:
    """The smallest multiple of `unit` that is at least n."""
    return -(-n // unit) * unit
