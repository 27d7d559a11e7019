"""A tiny policy, another model as its reference, and responses of ragged length to a few prompts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.models.decoder.decoder import init_params, make_decoder
from jaxalign.models.files.families import model_config
from jaxalign.rollout.batches import to_rollout_batch
from jaxalign.rollout.engine.engine import Response
from jaxalign.rollout.scored import ScoredResponses
from tests.algorithms.shared import TINY, make_responses


@pytest.fixture(scope="session")
def tiny():
    """(graphdef, policy's parameters, reference's parameters)"""
    config = model_config(TINY)
    graphdef, _ = make_decoder(config)
    return graphdef, *(init_params(config, jax.random.key(seed)) for seed in (0, 1))


@pytest.fixture(scope="session")
def pairs():
    return make_responses(16, k=2)


@pytest.fixture(scope="session")
def rolled_out():
    """15 ragged responses with log-probs some way from the policy's, and an empty row at the end."""
    count, rng = 16, np.random.default_rng(0)
    prompts = [rng.integers(3, 30, rng.integers(1, 5)).tolist() for _ in range(count - 1)]
    lengths = rng.integers(1, 8, count - 1)
    responses = [
        Response(rng.integers(3, 30, n), rng.normal(-3.4, 0.3, n).astype(np.float32), np.zeros(n), bool(n % 2))
        for n in lengths
    ]
    scores, advantages = rng.normal(size=(2, count - 1)).astype(np.float32)
    scored = ScoredResponses(np.arange(count - 1), responses, [""] * (count - 1), scores, {})
    batch = to_rollout_batch(scored, prompts, advantages=advantages, width=12, rows=count)
    return jax.tree.map(jnp.asarray, batch)
