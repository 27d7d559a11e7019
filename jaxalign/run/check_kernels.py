"""Comparison of the log-probability kernel with the chunked implementation, on the first batch before training."""

from __future__ import annotations

import logging
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxalign.models.reading import shards_of
from jaxalign.ops import logprobs_check
from jaxalign.training.sharding import put_batch
from jaxalign.training.step import cut
from jaxalign.types import PyTree, ResponseBatch, TokenBatch, UnpairedBatch

log = logging.getLogger(__name__)

INTERPRETED_TOKENS = 128


def check_kernels(graphdef: nnx.GraphDef, params: PyTree, batch: Any, mesh: Mesh, *, microbatches: int) -> None:
    """Raises Mistake if the log-probability kernel and the chunked implementation differ on the first microbatch.

    There is no kernel for a CPU: there the program of the TPU's kernel is interpreted, on a few tokens.
    """
    interpreted = mesh.devices.flat[0].platform == "cpu"
    if interpreted:
        log.warning("a CPU has no kernel; the TPU's is interpreted on the first %d tokens", INTERPRETED_TOKENS)

    def differences(params: PyTree, batch: TokenBatch) -> dict[str, logprobs_check.Difference]:
        part = jax.tree.map(lambda x: x[0], cut(batch, microbatches))
        model = nnx.merge(graphdef, params)
        hidden = model(part.tokens, positions=part.positions, segment_ids=part.segment_ids)
        targets = jnp.roll(part.tokens, -1, axis=1).reshape(-1)
        mask = jnp.roll(part.mask, -1, axis=1).at[:, -1].set(False).reshape(-1)
        hidden = hidden.reshape(-1, hidden.shape[-1])
        if interpreted:
            few = jnp.argsort(jnp.logical_not(mask))[:INTERPRETED_TOKENS]
            hidden, targets, mask = hidden[few], targets[few], mask[few]
        return logprobs_check.differences(hidden, model.unembed(), targets, mask, shards=shards_of(model))

    measured = jax.jit(differences, out_shardings=NamedSharding(mesh, P()))(params, put_batch(rows_of(batch), mesh))
    logprobs_check.refuse(measured)
    log.info("the log-probability kernel agrees with the chunked implementation: %s", logprobs_check.summary(measured))


def rows_of(batch: TokenBatch | ResponseBatch | UnpairedBatch) -> TokenBatch:
    """The rows that the trained model reads, of a batch of any command."""
    if isinstance(batch, UnpairedBatch):
        batch = batch.rated
    return batch.flat() if isinstance(batch, ResponseBatch) else batch
