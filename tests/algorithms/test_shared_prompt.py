"""A prompt computed once: every response's log-probability, and the gradient, as if each stood alone behind it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxalign.algorithms.pairwise import pairwise
from jaxalign.data.batches.groups import BatchShapes
from jaxalign.data.batches.plan import Plan
from jaxalign.losses import PAIR, select_loss
from jaxalign.models.decoder.attention import Coordinates, attention
from jaxalign.models.decoder.decoder import init_params, make_decoder
from jaxalign.models.files.families import model_config
from jaxalign.models.reading import LOGPS, PUBLIC, response_logps
from tests.algorithms.shared import make_responses
from tests.models.tiny import hf_config

COUNT, LENGTH = 12, 40


def batches(data, **plan):
    """(every response behind its own prompt, prompts shared)"""
    plans = [Plan(COUNT, LENGTH, share_prompt=share, **plan) for share in (False, True)]
    return [jax.tree.map(jnp.asarray, BatchShapes.of(data, plan).batch(data)) for plan in plans]


def by_response(batch, values):
    """Values [B G K] of the groups in the order of the column `number`."""
    return np.asarray(values)[np.asarray(batch.valid)][np.argsort(batch.columns["number"][batch.valid])]


@pytest.fixture(scope="module")
def data():
    groups = make_responses(COUNT, k=2, longest=8, seed=4)
    groups.columns["number"] = np.arange(COUNT)
    return groups


@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma2", "gpt2"])
def test_log_probs_are_those_of_responses_that_stand_alone(family, data):
    """With windows of 4 tokens that reach into the prompt, soft-caps, and learned positions, too."""
    config = model_config(hf_config(family))
    graphdef, _ = make_decoder(config)
    params = init_params(config, jax.random.key(0))
    read = jax.jit(lambda p, b: response_logps(nnx.merge(graphdef, p), b, wanted=(LOGPS, PUBLIC)))
    apart, shared = batches(data)
    assert (shared.sequences.segment_ids > 0).sum() < (apart.sequences.segment_ids > 0).sum()
    expected, stats = read(params, apart), read(params, shared)
    for name in (LOGPS, PUBLIC):
        ours, alone = by_response(shared, stats[name]), by_response(apart, expected[name])
        np.testing.assert_allclose(ours, alone, rtol=1e-6, atol=1e-5)


def test_the_gradient_is_that_of_responses_that_stand_alone(tiny, data):
    graphdef, policy, reference = tiny
    loss = select_loss("dpo + 0.1*sft + ld_dpo", PAIR)
    algorithm = pairwise(graphdef, graphdef, loss=loss)

    def mean(params, batch):
        prepared = algorithm.across(algorithm.prepare(policy, reference, batch))
        return algorithm.loss(params, prepared)[0].compute()

    step = jax.jit(jax.value_and_grad(mean))
    (expected, grads), (value, ours) = (step(policy, batch) for batch in batches(data))
    assert value == pytest.approx(float(expected), abs=1e-5)
    chex.assert_trees_all_close(ours, grads, atol=1e-5)


def test_splash_attention_refuses_to_share_a_prompt():
    heads, ids = jnp.zeros((1, 128, 2, 64)), jnp.ones((1, 128), jnp.int32)
    shared = Coordinates(ids, ids, ids, ids, prefix_ids=ids)
    with pytest.raises(ValueError, match="splash attention cannot share a prompt"):
        attention(heads, heads, heads, shared, window=None, softcap=None, scale=1.0, implementation="splash")
