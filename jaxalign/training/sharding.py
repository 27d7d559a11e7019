"""How a train step lies on a mesh: state by `models/places.py`, batches by rows. The one place that jits a step."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxalign.mistake import Mistake
from jaxalign.models.places import fetched, on_host, shardings
from jaxalign.training.state import TrainState
from jaxalign.training.step import TrainStep
from jaxalign.types import PyTree

ROWS = P(("data", "fsdp"))


def placed(tree: PyTree, mesh: Mesh, *, offload: bool = False) -> PyTree:
    """The tree as ShapeDtypeStructs that carry their shardings; with `offload` in the hosts' memory."""
    struct = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)  # noqa: E731
    return jax.tree.map(struct, tree, _places(tree, mesh, offload))


def _places(tree: PyTree, mesh: Mesh, offload: bool) -> PyTree:
    places = shardings(tree, mesh)
    return jax.tree.map(on_host, places) if offload else places


def check_batch_size(batch_size: int, microbatches: int, mesh: Mesh) -> None:
    """Raises Mistake unless every device owns an equal, whole number of rows of every microbatch."""
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    unit = devices * microbatches
    if batch_size < 1 or batch_size % unit:
        below, above = batch_size - batch_size % unit, batch_size + (-batch_size) % unit
        nearest = f"{below} or {above}" if below > 0 else f"{max(above, unit)}"
        raise Mistake(
            f"batch_size={batch_size} is not a multiple of data ({mesh.shape['data']}) x fsdp ({mesh.shape['fsdp']}) x "
            f"microbatches ({microbatches}) = {unit}; the nearest that is: {nearest}"
        )


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Global arrays, rows over `data` and `fsdp`, from each process's own rows."""
    sharding = NamedSharding(mesh, ROWS)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)


def jit_step(
    train_step: TrainStep, abstract_state: TrainState, frozen: PyTree, mesh: Mesh, *, offload: bool = False
) -> Any:
    """`train_step` compiled for the mesh: state donated and kept in place, batch by rows, metrics on every device.

    With `offload` the frozen tree lies in the hosts' memory, and the step itself brings it to the devices, where its
    room is free again behind its last use: of a reference that is `prepare`, before gradients and activations are made.
    """
    state = shardings(abstract_state, mesh)
    fetching = lambda state, frozen, batch: train_step(state, fetched(frozen), batch)  # noqa: E731
    return jax.jit(
        fetching if offload else train_step,
        in_shardings=(state, _places(frozen, mesh, offload), NamedSharding(mesh, ROWS)),
        out_shardings=(state, NamedSharding(mesh, P())),
        donate_argnums=0,
    )
