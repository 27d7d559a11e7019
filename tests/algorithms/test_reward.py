"""Reward models: the score stands at the last token, whatever the rows, the microbatches and the mesh."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxalign.algorithms.reward import response_scores, reward
from jaxalign.data.batches.groups import Responses
from jaxalign.losses.ranking import bradley_terry, kwise, process, rao_kupper, soft_bradley_terry
from jaxalign.models import heads, places
from jaxalign.models.adapters.lora import Lora, resolve_targets, split
from jaxalign.models.decoder.decoder import make_decoder
from jaxalign.models.files.families import model_config
from jaxalign.training import sharding
from jaxalign.training.optimizer import is_matrix
from jaxalign.training.part import laid_over
from jaxalign.training.state import TrainState
from jaxalign.training.step import make_train_step
from tests.algorithms.shared import LENGTH, QUICKLY, TINY, batch_of, make_responses

scores_of = jax.jit(response_scores, static_argnums=0, compiler_options=QUICKLY)


def loss_of(graphdef, loss, params, batch):
    value, metrics = jax.jit(reward(graphdef, loss=loss).loss, compiler_options=QUICKLY)(params, batch)
    return float(value.compute()), {name: float(average.compute()) for name, average in metrics.items()}


@pytest.fixture(scope="module")
def params(tiny):
    return {"model": tiny[1], "head": heads.init_head(jax.random.key(5), 3, 32)}


@pytest.mark.parametrize("packing", [True, False])
def test_a_score_is_read_at_the_last_token_of_its_sequence_alone(tiny, params, pairs, packing):
    """Padding is id 0 here and may as well be a token of the text: the batch's ids are not looked at."""
    model, batch = nnx.merge(tiny[0], params["model"]), batch_of(pairs, packing=packing)
    scores = np.asarray(scores_of(tiny[0], params, batch))[np.asarray(batch.present)]

    hidden = jax.jit(lambda ids: model(ids), compiler_options=QUICKLY)

    expected = []
    for ids, _ in (pairs.examples[int(e)] for e in pairs.groups.ravel()):
        row = np.pad(ids, (0, LENGTH - len(ids)), constant_values=ids[-1])[None].astype(np.int32)
        expected.append(np.asarray(hidden(row))[0, len(ids) - 1] @ np.asarray(params["head"]).T)
    in_order = [np.array(sorted(map(tuple, rows))) for rows in (scores, expected)]
    np.testing.assert_allclose(*in_order, atol=1e-4)


def test_packed_rows_give_the_gradient_of_padded_ones(tiny, params, pairs):
    algorithm = reward(tiny[0], loss=bradley_terry)

    def mean(params, batch):
        return algorithm.loss(params, batch)[0].compute()

    gradient = jax.jit(jax.value_and_grad(mean), compiler_options=QUICKLY)
    packed, padded = (gradient(params, batch_of(pairs, packing=p)) for p in (True, False))
    chex.assert_trees_all_close(packed, padded, atol=1e-5)


def test_missing_candidates_are_in_no_pair_and_a_lone_response_in_no_mean(tiny, params):
    whole = make_responses(6, k=3, seed=2)
    groups = whole.groups.copy()
    groups[0, 2] = groups[1, 1] = groups[1, 2] = -1
    batch = batch_of(Responses(whole.examples, groups, {}), packing=False)
    member_scores = np.asarray(scores_of(tiny[0], params, batch))[:, 0]
    losses = []
    for scores, present in zip(member_scores, groups >= 0, strict=True):
        count = int(present.sum())
        pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
        if pairs:
            losses.append(np.mean([np.log1p(np.exp(scores[j] - scores[i])) for i, j in pairs]))
    assert len(losses) == 5
    value, metrics = loss_of(tiny[0], kwise, params, batch)
    assert value == pytest.approx(np.mean(losses), abs=1e-5)
    assert metrics["disagreement"] > 0


def trained(graphdef, params, pairs, *, frozen=None, microbatches=1, sizes=None, steps=3):
    optimizer = optax.sgd(0.1)  # linear in the gradient: Adam magnifies rounding where a gradient is near 0
    algorithm = reward(graphdef, loss=bradley_terry)._replace(assemble=laid_over)
    step = make_train_step(algorithm, optimizer, microbatches=microbatches)
    batch = batch_of(pairs, unit=16)
    state = TrainState.create(jax.tree.map(jnp.copy, params), optimizer, jax.random.key(0))  # the step donates it
    if sizes is None:
        step = jax.jit(step)
    else:
        mesh = places.make_mesh(**sizes)
        step = sharding.jit_step(step, state, frozen, mesh)
        state = jax.device_put(state, places.shardings(state, mesh))
        frozen = jax.device_put(frozen, places.shardings(frozen, mesh))
        batch = sharding.put_batch(jax.device_get(batch), mesh)
    step = step.lower(state, frozen, batch).compile(compiler_options=QUICKLY)
    for _ in range(steps):
        state, metrics = step(state, frozen, batch)
    return jax.device_get(state.params), jax.device_get(metrics)


def test_microbatches_and_meshes_give_the_same_parameters(tiny, params, pairs):
    expected, _ = trained(tiny[0], params, pairs)
    moved = jax.tree.map(lambda new, old: float(np.abs(new - np.asarray(old)).max()), expected, params)
    assert min(moved["head"], moved["model"]["blocks"]["mlp"]["gate"]["kernel"]) > 1e-3
    result, _ = trained(tiny[0], params, pairs, microbatches=2, sizes={"data": 2, "fsdp": 2, "tensor": 2})
    chex.assert_trees_all_close(result, expected, atol=1e-5)


@pytest.fixture(scope="module")
def adapted(params):
    """(graphdef, heads with adapters whose B is not 0, for three members, their trunk)"""
    config = model_config(TINY)
    graphdef, abstract = make_decoder(config, lora=Lora(2, 4.0, resolve_targets("q_proj,down_proj", config)))
    _, adapter = split(abstract)
    rng = np.random.default_rng(3)
    drawn = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=(3, *leaf.shape)), leaf.dtype), adapter)
    return graphdef, {"head": params["head"], "members": drawn}, {"model": params["model"]}


@pytest.fixture(scope="module")
def together(adapted, pairs):
    """(params, metrics) after a step of all members."""
    graphdef, start, trunk = adapted
    return trained(graphdef, start, pairs, frozen=trunk, steps=1)


def test_members_with_adapters_are_trained_in_one_step_as_each_would_be_alone(adapted, together, pairs):
    """The loss is the members' mean, so a third of the rate is each one's own."""
    graphdef, start, trunk = adapted
    assert together[1]["disagreement"] > 0.1
    alone = {"head": start["head"][1:2], "members": jax.tree.map(lambda x: x[1:2], start["members"])}
    result, _ = trained(graphdef, alone, pairs, frozen=trunk, steps=1)

    def moved(after, before, member):
        return jax.tree.map(lambda a, b: a[member] - np.asarray(b)[member], after, before)

    chex.assert_trees_all_close(
        jax.tree.map(lambda x: 3 * x, moved(together[0], start, 1)), moved(result, alone, 0), atol=1e-5
    )


def test_members_on_a_mesh_end_where_they_end_on_one_device(adapted, together, pairs):
    graphdef, start, trunk = adapted
    sizes = {"data": 2, "fsdp": 2, "tensor": 2}
    result, _ = trained(graphdef, start, pairs, frozen=trunk, sizes=sizes, microbatches=2, steps=1)
    chex.assert_trees_all_close(result, together[0], atol=1e-5)
    mesh = places.make_mesh(**sizes)
    placed = places.shardings(start, mesh)["members"]["blocks"]["attention"]["query"]["adapter"]
    assert placed["a"].spec == P(None, None, "fsdp", None) and placed["b"].spec == P(None, None, None, "tensor")


def test_weight_decay_knows_a_matrix_beneath_the_axes_of_members_and_layers(adapted, params):
    _, start, trunk = adapted
    decayed = is_matrix({**start, **trunk})
    assert decayed["head"] and decayed["members"]["blocks"]["attention"]["query"]["adapter"]["a"]
    assert decayed["model"]["blocks"]["mlp"]["gate"]["kernel"]
    assert not decayed["model"]["blocks"]["mlp_norm"]["scale"] and not decayed["model"]["norm"]["scale"]


def test_ties_and_probabilities_of_a_preference_reach_their_losses(tiny, params):
    responses = make_responses(4, k=2, seed=4)
    columns = {"tie": np.array([0, 1, 0, 1], bool), "preference": np.array([1, 0.5, 0.25, 1], np.float32)}
    batch = batch_of(Responses(responses.examples, responses.groups, columns), packing=False)
    scores = np.asarray(scores_of(tiny[0], params, batch))[:, 0]  # [4 K M]
    difference = scores[:, 0] - scores[:, 1]

    def log_sigmoid(x):
        return -np.log1p(np.exp(-x))

    p = columns["preference"][:, None]
    soft, _ = loss_of(tiny[0], soft_bradley_terry, params, batch)
    assert soft == pytest.approx(np.mean(-p * log_sigmoid(difference) - (1 - p) * log_sigmoid(-difference)), abs=1e-5)
    win, lose = (-log_sigmoid(sign * difference - np.log(3)) for sign in (1, -1))
    tied = np.where(columns["tie"][:, None], win + lose - np.log(8), win)
    value, metrics = loss_of(tiny[0], rao_kupper, params, batch)
    assert value == pytest.approx(np.mean(tied), abs=1e-5)
    assert metrics["accuracy"] == np.mean(difference.mean(1)[[0, 2]] > 0)


def test_the_least_member_is_no_more_than_the_mean_and_one_member_agrees_with_itself():
    scores = jnp.array([[1.0, 3.0], [2.0, 2.0]])
    assert heads.combine(scores, "mean").tolist() == [2.0, 2.0]
    assert heads.combine(scores, "min").tolist() == [1.0, 2.0]
    assert heads.combine(scores, "mean_minus_std(k=0.5)").tolist() == [1.5, 2.0]
    assert heads.disagreement(scores[:, :1]).tolist() == [0.0, 0.0]


def test_a_loss_of_steps_is_refused(tiny):
    with pytest.raises(ValueError, match="has an unknown input 'step_scores'"):
        reward(tiny[0], loss=process)
    reward(tiny[0], loss=bradley_terry)
