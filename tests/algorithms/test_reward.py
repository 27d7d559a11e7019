"""Reward models: the score stands at the last token, whatever the rows, the microbatches and the mesh."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxalign.algorithms.reward import response_scores, reward
from jaxalign.data.groups import GroupPlan, Layout, Responses
from jaxalign.losses.ranking import bradley_terry, kwise, process
from jaxalign.models import heads
from jaxalign.training import sharding
from jaxalign.training.state import TrainState
from jaxalign.training.step import make_train_step
from tests.algorithms.conftest import make_responses

LENGTH = 20


def batch_of(responses, *, packing=True, unit=1):
    plan = GroupPlan(len(responses), LENGTH, unit=unit, packing=packing)
    return jax.tree.map(jnp.asarray, Layout.of(responses, plan).batch(responses))


@pytest.fixture(scope="module")
def params(tiny):
    return {"model": tiny[1], "head": heads.init_head(jax.random.key(5), 3, 32)}


@pytest.mark.parametrize("packing", [True, False])
def test_a_score_is_read_at_the_last_token_of_its_sequence_alone(tiny, params, pairs, packing):
    """Padding is id 0 here and may as well be a token of the text: the batch's ids are not looked at."""
    model, batch = nnx.merge(tiny[0], params["model"]), batch_of(pairs, packing=packing)
    found = np.asarray(response_scores(model, params["head"], batch))[np.asarray(batch.present)]

    @jax.jit
    def hidden(ids):
        return model(ids)

    expected = []
    for ids, _ in (pairs.examples[int(e)] for e in pairs.groups.ravel()):
        row = np.pad(ids, (0, LENGTH - len(ids)), constant_values=ids[-1])[None].astype(np.int32)
        expected.append(np.asarray(hidden(row))[0, len(ids) - 1] @ np.asarray(params["head"]).T)
    order = lambda x: np.array(sorted(map(tuple, x)))  # noqa: E731
    np.testing.assert_allclose(order(found), order(expected), atol=1e-4)


def mean_loss(algorithm, params, batch):
    def mean(params):
        value, metrics = algorithm.loss(params, batch)
        return value.compute(), metrics

    (value, metrics), grads = jax.jit(jax.value_and_grad(mean, has_aux=True))(params)
    return float(value), grads, {name: float(average.compute()) for name, average in metrics.items()}


def test_packed_rows_give_the_gradient_of_padded_ones(tiny, params, pairs):
    packed, padded = (mean_loss(reward(tiny[0]), params, batch_of(pairs, packing=p)) for p in (True, False))
    assert packed[0] == pytest.approx(padded[0], abs=1e-5)
    chex.assert_trees_all_close(packed[1], padded[1], atol=1e-5)


def test_missing_candidates_are_in_no_pair_and_a_lone_response_in_no_mean(tiny, params):
    whole = make_responses(6, k=3, seed=2)
    groups = whole.groups.copy()
    groups[0, 2] = groups[1, 1] = groups[1, 2] = -1
    batch = batch_of(Responses(whole.examples, groups, {}), packing=False)
    found = np.asarray(response_scores(nnx.merge(tiny[0], params["model"]), params["head"], batch))[:, 0]
    losses = []
    for scores, here in zip(found, groups >= 0, strict=True):
        count = int(here.sum())
        pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
        if pairs:
            losses.append(np.mean([np.log1p(np.exp(scores[j] - scores[i])) for i, j in pairs]))
    assert len(losses) == 5
    value, _, metrics = mean_loss(reward(tiny[0], loss=kwise), params, batch)
    assert value == pytest.approx(np.mean(losses), abs=1e-5)
    assert metrics["disagreement"] > 0


def trained(tiny, params, pairs, *, microbatches, sizes=None, steps=3):
    optimizer = optax.sgd(0.1)  # linear in the gradient: Adam magnifies rounding where a gradient is near 0
    step = make_train_step(reward(tiny[0]), optimizer, microbatches=microbatches)
    batch = batch_of(pairs, unit=16)
    state = TrainState.create(jax.tree.map(jnp.copy, params), optimizer, jax.random.key(0))  # the step donates it
    if sizes is None:
        step = jax.jit(step)
    else:
        mesh = sharding.make_mesh(**sizes)
        step = sharding.jit_step(step, state, None, mesh)
        state = jax.device_put(state, sharding.shardings(state, mesh))
        batch = sharding.put_batch(jax.device_get(batch), mesh)
    for _ in range(steps):
        state, metrics = step(state, None, batch)
    return jax.device_get(state.params), jax.device_get(metrics)


def test_microbatches_and_meshes_give_the_same_parameters(tiny, params, pairs):
    expected, _ = trained(tiny, params, pairs, microbatches=1)
    moved = jax.tree.map(lambda new, old: float(np.abs(new - np.asarray(old)).max()), expected, params)
    assert min(moved["head"], moved["model"]["blocks"]["mlp"]["gate"]["kernel"]) > 1e-3
    for microbatches, sizes in ((4, None), (2, {"data": 2, "fsdp": 2, "tensor": 2})):
        found, _ = trained(tiny, params, pairs, microbatches=microbatches, sizes=sizes)
        chex.assert_trees_all_close(found, expected, atol=1e-5)


def test_the_least_member_is_no_more_than_the_mean_and_one_member_agrees_with_itself():
    scores = jnp.array([[1.0, 3.0], [2.0, 2.0]])
    assert heads.combine(scores, "mean").tolist() == [2.0, 2.0]
    assert heads.combine(scores, "min").tolist() == [1.0, 2.0]
    assert heads.combine(scores, "mean_minus_std(k=0.5)").tolist() == [1.5, 2.0]
    assert heads.disagreement(scores[:, :1]).tolist() == [0.0, 0.0]


def test_a_loss_of_steps_is_refused(tiny):
    with pytest.raises(ValueError, match="asks for an input 'step_scores'"):
        reward(tiny[0], loss=process)
    reward(tiny[0], loss=bradley_terry)
