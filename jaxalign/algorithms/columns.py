"""Columns of a batch: values about its tokens, responses or groups, which the loss reads by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp

from jaxalign.types import Average, ResponseBatch, RolloutBatch

Batch = TypeVar("Batch", ResponseBatch, RolloutBatch)

# Prefixes of columns that hold a model's statistics of responses: of the policy before the update, of the reference.
OLD, REF = "old_", "ref_"


def with_columns(batch: Batch, columns: Mapping[str, jax.Array], *, prefix: str = "") -> Batch:
    """The batch with more columns, their names behind `prefix`."""
    added = {prefix + name: value for name, value in columns.items()}
    return dataclasses.replace(batch, columns={**batch.columns, **added})


def columns_of(batch: ResponseBatch, prefix: str) -> dict[str, jax.Array]:
    """The columns behind `prefix`, without it."""
    return {n.removeprefix(prefix): v for n, v in batch.columns.items() if n.startswith(prefix)}


def with_averages(batch: ResponseBatch, averages: Mapping[str, Average]) -> ResponseBatch:
    """The batch with each average's value in every entry of a column [B G], so that every microbatch has it."""
    shape = batch.valid.shape
    return with_columns(batch, {name: jnp.broadcast_to(a.compute(), shape) for name, a in averages.items()})
