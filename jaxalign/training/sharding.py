"""Placement of a train step on a mesh: state by `models/places.py`, batches by rows. Only this module jits a step."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxalign.mistake import Mistake
from jaxalign.models.places import fetched, placed, shardings
from jaxalign.training.state import TrainState
from jaxalign.training.step import TrainStep
from jaxalign.types import PyTree

ROWS = P(("data", "fsdp"))


def check_batch_size(batch_size: int, microbatches: int, mesh: Mesh) -> None:
    """Raises Mistake unless every device owns the same whole number of rows of every microbatch."""
    unit = mesh.shape["data"] * mesh.shape["fsdp"] * microbatches
    if batch_size < 1 or batch_size % unit:
        below, above = batch_size - batch_size % unit, batch_size + (-batch_size) % unit
        nearest = f"{below} or {above}" if below > 0 else f"{max(above, unit)}"
        raise Mistake(
            f"`batch_size` {batch_size} is not a multiple of `mesh.data` ({mesh.shape['data']}) x `mesh.fsdp` "
            f"({mesh.shape['fsdp']}) x `microbatches` ({microbatches}) = {unit}; the nearest: {nearest}"
        )


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """The batch, which every process has whole, on the mesh: rows over its axes `data` and `fsdp`.

    The sharding decides which rows a device gets, so replicas over `tensor` get the same ones, whatever host they are
    on, and no row is left out or read twice.
    """
    sharding = NamedSharding(mesh, ROWS)

    def put(x: Any) -> jax.Array:
        whole = np.asarray(x)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(put, batch)


def jit_step(
    train_step: TrainStep, abstract_state: TrainState, frozen: PyTree, mesh: Mesh, *, offload: bool = False
) -> Any:
    """`train_step` compiled for the mesh: state donated and kept in place, batch by rows, metrics on every device.

    With `offload` the frozen tree lies in host memory. The step copies it to the devices and frees it after its last
    use, which for a reference is `prepare`, before gradients and activations exist.
    """
    state = shardings(abstract_state, mesh)

    def fetching(state: TrainState, frozen: PyTree, batch: Any) -> Any:
        return train_step(state, fetched(frozen), batch)

    return jax.jit(
        fetching if offload else train_step,
        in_shardings=(
            state,
            jax.tree.map(lambda x: x.sharding, placed(frozen, mesh, offload=offload)),
            NamedSharding(mesh, ROWS),
        ),
        out_shardings=(state, NamedSharding(mesh, P())),
        donate_argnums=0,
    )
