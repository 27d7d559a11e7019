"""Metrics of held-out batches, merged exactly: sums over sums, on every host alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxalign.algorithms.base import Algorithm
from jaxalign.training.sharding import put_batch
from jaxalign.training.state import TrainState
from jaxalign.types import PyTree


def make_evaluate(
    algorithm: Algorithm, batches: Sequence[Any], mesh: Mesh, frozen: PyTree = None
) -> Callable[[TrainState], dict[str, float]]:
    """state -> {"eval_loss": ..., "eval_<metric>": ...}: the algorithm's own loss over all of `batches`.

    Each batch is read as if it came next in training, but the algorithm's updated memory is discarded.
    """

    def averages(params: PyTree, carry: PyTree, frozen: PyTree, batch: Any) -> dict[str, Any]:
        params = algorithm.assemble(params, frozen)
        _, batch = algorithm.remember(carry, algorithm.prepare(params, frozen, batch))
        loss, metrics = algorithm.loss(params, algorithm.across(batch))
        return {"loss": loss, **metrics}

    compiled = jax.jit(averages, out_shardings=NamedSharding(mesh, P()))

    def evaluate(state: TrainState) -> dict[str, float]:
        reference = frozen if algorithm.follow is None else state.reference
        total = None
        for batch in batches:
            part = compiled(state.params, state.carry, reference, put_batch(batch, mesh))
            total = part if total is None else {name: total[name] + part[name] for name in total}
        return {f"eval_{name}": float(average.compute()) for name, average in total.items()}

    return evaluate
