"""Scalar heads on a decoder; several are an ensemble, whose disagreement measures how uncertain a score is.

A scorer's parameters are {"model": the trunk, "head": [M D]}, and {"members": adapters [M ...]} if each member has its
own adapters on the one trunk. A head that was read with a bias is [M D + 1], the bias in its last column. Axis letters:
M members, D model width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxalign.kernels.products import times
from jaxalign.models.adapters.lora import join
from jaxalign.models.decoder.config import ModelConfig
from jaxalign.select import select
from jaxalign.types import PyTree


def trunk_config(config: ModelConfig) -> ModelConfig:
    """The config without an output matrix, since a head reads hidden states only."""
    return dataclasses.replace(config, tied=True)


def init_head(key: jax.Array, members: int, width: int) -> jax.Array:
    """Float32[M D], normal with standard deviation 1/√(D + 1).

    Reference: Stiennon et al. 2020, https://arxiv.org/abs/2009.01325, appendix B.
    """
    return jax.random.normal(key, (members, width), jnp.float32) / jnp.sqrt(jnp.float32(width + 1))


def scores(hidden: jax.Array, head: jax.Array) -> jax.Array:
    """Float32[... M], hidden [... D] · head [M D], summed in float32 whatever the trunk computes in.

    With a head [M D + 1] the last column, a bias, is added.
    """
    width = hidden.shape[-1]
    wide = hidden.astype(jnp.float32), head[:, :width].astype(jnp.float32)
    products = times("...d,md->...m", *wide)
    if head.shape[1] == width:
        return products
    return products + head[:, width].astype(jnp.float32).reshape((1,) * (products.ndim - 1) + (-1,))


def each_member(graphdef: nnx.GraphDef, params: PyTree, score: Callable[[Any, jax.Array], jax.Array]) -> jax.Array:
    """`score(model, head [M D])` [... M] of all members: in one call on a shared trunk, or by vmap over adapters."""
    if "members" not in params:
        return score(nnx.merge(graphdef, params["model"]), params["head"])

    def of_member(adapter: PyTree, head: jax.Array) -> jax.Array:
        return score(nnx.merge(graphdef, join(adapter, params["model"])), head[None])[..., 0]

    return jax.vmap(of_member, out_axes=-1)(params["members"], params["head"])


def mean(scores: jax.Array) -> jax.Array:
    """Mean [...] of the members' scores [... M]."""
    return jnp.mean(scores, axis=-1)


def least(scores: jax.Array) -> jax.Array:
    """The lowest of the members' scores. Coste et al. 2023, https://arxiv.org/abs/2310.02743 (worst-case)."""
    return jnp.min(scores, axis=-1)


def mean_minus_std(scores: jax.Array, *, k: float = 1.0) -> jax.Array:
    """mean - k · standard deviation over the members."""
    return mean(scores) - k * disagreement(scores)


RULES: dict[str, Callable] = {"mean": mean, "min": least, "mean_minus_std": mean_minus_std}


def combine(scores: jax.Array, rule: str = "mean") -> jax.Array:
    """One score [...] from the members' [... M], by a rule of RULES: "mean", "min" or "mean_minus_std(k=0.5)".

    Ranking losses see differences only, so each member's zero is arbitrary: "min" needs normalised scores. Raises
    Mistake on an unknown rule.
    """
    return select(rule, RULES)(scores)


def disagreement(scores: jax.Array) -> jax.Array:
    """Standard deviation [...] over the members of [... M]; 0 for a single one."""
    return jnp.std(scores, axis=-1)
