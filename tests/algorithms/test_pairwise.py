"""DPO and its family: the same whatever the rows, the microbatches and the mesh."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxalign.algorithms.pairwise import pairwise
from jaxalign.data.batches.groups import BatchShapes
from jaxalign.data.batches.plan import Plan
from jaxalign.losses import PAIR, contract, dpo, select_loss
from jaxalign.mistake import Mistake
from jaxalign.models import places
from jaxalign.models.reading import COLLISION, LOGPS, PUBLIC, response_logps
from jaxalign.ops.logprobs import next_token_logps
from jaxalign.training import sharding
from jaxalign.training.state import TrainState
from jaxalign.training.step import make_train_step

LENGTH, COUNT = 20, 16
LOSSES = ["0.5*dpo + 0.2*sft", "beta_dpo", "ld_dpo", "wpo"]


def batch_of(pairs, *, packing=True, unit=1):
    plan = Plan(COUNT, LENGTH, unit=unit, packing=packing)
    return jax.tree.map(jnp.asarray, BatchShapes.of(pairs, plan).batch(pairs))


def alone(params, graphdef, pairs):
    """log π of every response, each in a row of its own without neighbours, [N K]."""
    model = nnx.merge(graphdef, params)

    @jax.jit
    def one(ids, mask):
        return next_token_logps(model(ids), model.unembed(), ids, mask).logps.sum()

    padded = [[np.pad(x, (0, LENGTH - len(x)))[None] for x in pairs.examples[int(e)]] for e in pairs.groups.ravel()]
    return np.array([float(one(ids.astype(np.int32), mask)) for ids, mask in padded]).reshape(pairs.groups.shape)


@pytest.fixture(scope="module")
def policy_logps(tiny, pairs):
    return alone(tiny[1], tiny[0], pairs)


def loss_of(text):
    return select_loss(text, PAIR)


def value_and_grads(algorithm, tiny, batch, params=None):
    _, policy, reference = tiny
    params = policy if params is None else params

    def mean(params):
        prepared = algorithm.across(algorithm.prepare(policy, reference, batch))
        loss, metrics = algorithm.loss(params, prepared)
        return loss.compute(), {"loss": loss, **metrics}

    (value, metrics), grads = jax.jit(jax.value_and_grad(mean, has_aux=True))(params)
    return value, grads, {name: float(average.compute()) for name, average in metrics.items()}


@pytest.mark.parametrize("packing", [True, False])
def test_log_probs_of_responses_are_those_of_each_alone(tiny, pairs, policy_logps, packing):
    batch = batch_of(pairs, packing=packing)
    stats = response_logps(nnx.merge(tiny[0], tiny[1]), batch, wanted=(LOGPS, PUBLIC, COLLISION))
    assert sorted(np.asarray(stats[LOGPS])[np.asarray(batch.present)]) == pytest.approx(
        sorted(policy_logps.ravel()), abs=1e-4
    )
    shorter = np.asarray(stats[PUBLIC] >= stats[LOGPS] - 1e-5)  # fewer tokens, each of log-probability below 0
    assert shorter.all() and (np.asarray(stats[COLLISION])[np.asarray(batch.present)] < 0).all()


def test_where_policy_and_reference_agree_the_loss_is_log_two_and_rewards_are_zero(tiny, pairs):
    graphdef, policy, _ = tiny
    value, _, metrics = value_and_grads(
        pairwise(graphdef, graphdef, loss=dpo), (graphdef, policy, policy), batch_of(pairs)
    )
    assert value == pytest.approx(np.log(2), abs=1e-6)
    assert abs(metrics["rewards/chosen"]) < 1e-5 and abs(metrics["rewards/margins"]) < 1e-5


def test_the_loss_is_the_mean_over_pairs_of_the_formula(tiny, pairs, policy_logps):
    graphdef, _, reference = tiny
    ratio = policy_logps - alone(reference, graphdef, pairs)
    expected = np.mean(np.log1p(np.exp(-0.1 * (ratio[:, 0] - ratio[:, 1]))))
    value, _, metrics = value_and_grads(pairwise(graphdef, graphdef, loss=dpo), tiny, batch_of(pairs))
    assert value == pytest.approx(expected, abs=1e-5)
    assert metrics["rewards/accuracies"] == np.mean(ratio[:, 0] > ratio[:, 1])
    assert metrics["logps/chosen"] == pytest.approx(policy_logps[:, 0].mean(), abs=1e-4)


@pytest.mark.parametrize("text", LOSSES)
def test_packed_rows_give_the_gradient_of_padded_ones(tiny, pairs, text):
    graphdef = tiny[0]
    algorithm = pairwise(graphdef, graphdef, loss=loss_of(text), pairs=COUNT)
    packed, padded = (value_and_grads(algorithm, tiny, batch_of(pairs, packing=p)) for p in (True, False))
    assert packed[0] == pytest.approx(float(padded[0]), abs=1e-5)
    chex.assert_trees_all_close(packed[1], padded[1], atol=1e-5)


def test_a_whole_batch_loss_has_the_gradient_of_the_loss_itself(tiny, pairs, policy_logps):
    """Its linear stand-in against autodiff through the sort, at the same parameters."""
    graphdef, policy, reference = tiny
    batch, loss = batch_of(pairs, packing=False), loss_of("aot")
    assert contract.needs_whole_batch(loss)

    def direct(params):
        logps = response_logps(nnx.merge(graphdef, params), batch)[LOGPS][:, 0]
        ref = response_logps(nnx.merge(graphdef, reference), batch)[LOGPS][:, 0]
        return jnp.mean(loss(logps[:, 0], logps[:, 1], ref[:, 0], ref[:, 1]))

    value, grads = jax.jit(jax.value_and_grad(direct))(policy)
    algorithm = pairwise(graphdef, graphdef, loss=loss, pairs=COUNT)
    linear, slopes, _ = value_and_grads(algorithm, tiny, batch)
    assert linear == pytest.approx(float(value), abs=1e-5)
    chex.assert_trees_all_close(slopes, grads, atol=1e-6)


def trained(tiny, pairs, text, *, microbatches, mesh_sizes=None, steps=3):
    graphdef, policy, reference = tiny
    algorithm = pairwise(graphdef, graphdef, loss=loss_of(text), pairs=COUNT)
    # Not more than 1e-3: one weight of 1,024 has a gradient of 5.06e-8 where others have up to 6e-3. Float32 sums in
    # another order make it 4.94e-8, and Adam's g / (|g| + 1e-8) 0.8315 in place of 0.8349, which is 3.3e-5 at a rate of
    # 1e-2. SGD at a rate of 0.1 moves weights by up to 1.5e-2 in these three steps, and there all agree to 3e-8.
    optimizer = optax.adamw(1e-3)
    step = make_train_step(algorithm, optimizer, microbatches=microbatches)
    batch = batch_of(pairs, unit=16)
    copy = jax.tree.map(jnp.copy, policy)  # the step donates it
    state = TrainState.create(copy, optimizer, jax.random.key(0), carry=algorithm.carry)
    if mesh_sizes is None:
        step = jax.jit(step)
    else:
        mesh = places.make_mesh(**mesh_sizes)
        step = sharding.jit_step(step, state, reference, mesh)
        state = jax.device_put(state, places.shardings(state, mesh))
        reference = jax.device_put(reference, places.shardings(reference, mesh))
        batch = sharding.put_batch(jax.device_get(batch), mesh)
    for _ in range(steps):
        state, metrics = step(state, reference, batch)
    means = {name: average.compute() for name, average in dict(state.carry).items()}
    return jax.device_get((state.params, means)), jax.device_get(metrics)


@pytest.mark.parametrize("text", ["dpo", "aot + bco_pair + beta_dpo"])
def test_microbatches_and_meshes_give_the_same_parameters_and_running_means(tiny, pairs, text):
    expected, metrics = trained(tiny, pairs, text, microbatches=1)
    result, others = trained(tiny, pairs, text, microbatches=2, mesh_sizes={"data": 2, "fsdp": 2, "tensor": 2})
    chex.assert_trees_all_close(result, expected, atol=1e-5)
    assert others["loss"] == pytest.approx(float(metrics["loss"]), abs=1e-5)


def test_log_probs_that_come_with_the_batch_are_taken_and_the_reference_not_run(tiny, pairs):
    graphdef, _, reference = tiny
    algorithm = pairwise(graphdef, loss=dpo)
    batch = batch_of(pairs)
    ref = response_logps(nnx.merge(graphdef, reference), batch)[LOGPS]
    precomputed = jax.tree.map(lambda x: x, batch)
    precomputed.columns["ref_logps"] = ref
    expected, _, _ = value_and_grads(pairwise(graphdef, graphdef, loss=dpo), tiny, batch)
    value, _, _ = value_and_grads(algorithm, (graphdef, tiny[1], None), precomputed)
    assert value == pytest.approx(float(expected), abs=1e-6)


def test_eight_pairs_are_learned_by_heart(tiny, pairs):
    graphdef, policy, _ = tiny
    few = pairs.take(range(8))
    batch = jax.tree.map(jnp.asarray, BatchShapes.of(few, Plan(8, LENGTH)).batch(few))
    optimizer = optax.adamw(3e-3)
    step = jax.jit(make_train_step(pairwise(graphdef, graphdef, loss=dpo), optimizer))
    state = TrainState.create(policy, optimizer, jax.random.key(0))
    for _ in range(40):
        state, metrics = step(state, policy, batch)
    assert metrics["rewards/accuracies"] == 1.0 and metrics["loss"] < 0.3


def test_values_that_are_not_one_per_pair_are_refused_where_the_loss_is_traced(tiny, pairs):
    def mean(policy_chosen_logps):
        return policy_chosen_logps.mean()

    algorithm = pairwise(tiny[0], loss=mean)
    with pytest.raises(
        Mistake, match=r"mean returned float32\[\] .*; it must return float32\[\d+\], one value for each"
    ):
        jax.eval_shape(algorithm.loss, tiny[1], batch_of(pairs))


def test_an_input_that_does_not_exist_is_named():
    def mine(policy_chosen_logps, policy_rejectd_logps):
        return policy_chosen_logps

    with pytest.raises(ValueError, match=r"policy_rejectd_logps.*did you mean 'policy_rejected_logps'"):
        pairwise(None, loss=mine)
