"""The critic: a scalar head on a trunk of its own, or on the policy's.

Its parameters are {"model": the trunk, "head": [1 D], "bias": [1]}; without "model" the head reads the policy's hidden
states, and without "bias" it adds none. values[:, t] is the reward that the response will still earn, before token t is
chosen: it reads tokens < t.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxalign.models import heads
from jaxalign.models.reading import hidden_states
from jaxalign.types import PyTree, TokenBatch


def token_values(critic: PyTree, hidden: jax.Array) -> jax.Array:
    """Float32[B T]: values[:, t] = hidden[:, t - 1] · head + bias; the first token of a row has none, 0."""
    values = heads.scores(hidden, critic["head"])[..., 0]
    if "bias" in critic:
        values = values + critic["bias"][0].astype(jnp.float32)
    return jnp.pad(values[:, :-1], ((0, 0), (1, 0)))


def critic_values(
    graphdef: nnx.GraphDef, critic: PyTree, rows: TokenBatch, policy_hidden: jax.Array | None
) -> jax.Array:
    """`token_values` by the critic's own trunk, where it has one, else by the policy's hidden states."""
    if "model" in critic:
        _, hidden = hidden_states(graphdef, critic["model"], rows)
    else:
        assert policy_hidden is not None
        hidden = policy_hidden
    return token_values(critic, hidden)
