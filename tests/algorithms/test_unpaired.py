"""KTO: its KL is of the global batch, the same for policy and reference, and microbatches change nothing."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxalign.algorithms.unpaired import unpaired
from jaxalign.data.batches.groups import UnpairedBatches
from jaxalign.data.batches.plan import Mixture, Plan
from jaxalign.data.sets.preferences import mismatched
from jaxalign.losses import UNPAIRED, select_loss
from jaxalign.models import places
from jaxalign.models.reading import LOGPS, response_logps
from jaxalign.training import sharding
from jaxalign.training.state import TrainState
from jaxalign.training.step import make_train_step
from tests.algorithms.shared import make_responses

COUNT, LENGTH = 16, 20


@pytest.fixture(scope="module")
def rated():
    return make_responses(COUNT, k=1, seed=3)


def batch_of(rated, *, unit=1, packing=True):
    plan = Plan(COUNT, LENGTH, unit=unit, packing=packing, shuffle=False)
    batches = UnpairedBatches(Mixture.of(rated, [COUNT], [None]), mismatched(rated, seed=0), plan, steps=1)
    return jax.tree.map(jnp.asarray, batches[0])


@functools.cache
def made(graphdef, text, microbatches, rate):
    """(algorithm, optimizer, train step); the same step is compiled once."""
    algorithm, optimizer = unpaired(graphdef, graphdef, loss=select_loss(text, UNPAIRED)), optax.adamw(rate)
    return algorithm, optimizer, make_train_step(algorithm, optimizer, microbatches=microbatches)


def trained(tiny, rated, *, microbatches, mesh_sizes=None, steps=3, text="kto", packing=True, rate=1e-3):
    graphdef, policy, reference = tiny
    algorithm, optimizer, step = made(graphdef, text, microbatches, rate)
    batch = batch_of(rated, unit=16, packing=packing)
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


def test_at_the_reference_the_loss_is_half_the_weight_and_the_kl_is_zero(tiny, rated):
    graphdef, policy, _ = tiny
    _, metrics = trained((graphdef, policy, policy), rated, microbatches=1, steps=1)
    assert metrics["loss"] == pytest.approx(0.5, abs=1e-6) and metrics["kl"] == pytest.approx(0, abs=1e-5)


def test_the_kl_is_the_mean_log_ratio_of_every_mismatched_response(tiny, rated):
    graphdef, policy, reference = tiny
    batch = batch_of(rated)
    ratio = sum(
        sign * response_logps(nnx.merge(graphdef, params), batch.mismatched)[LOGPS]
        for sign, params in ((1, policy), (-1, reference))
    )
    _, metrics = trained(tiny, rated, microbatches=1, steps=1)
    assert metrics["kl"] == pytest.approx(float(jnp.sum(ratio)) / COUNT, abs=1e-4)


@pytest.mark.parametrize("text", ["kto", "bco"])
def test_microbatches_meshes_and_packing_give_the_same_parameters(tiny, rated, text):
    expected, metrics = trained(tiny, rated, microbatches=1, text=text)
    cut = {"microbatches": 2, "mesh_sizes": {"data": 2, "fsdp": 2, "tensor": 2}, "packing": False}
    result, others = trained(tiny, rated, text=text, **cut)
    chex.assert_trees_all_close(result, expected, atol=1e-5)
    assert others["loss"] == pytest.approx(float(metrics["loss"]), abs=1e-5)


def test_no_prompt_meets_its_own_response_and_each_response_is_used_once():
    rated = make_responses(9, k=1, seed=5)
    others = mismatched(rated, seed=2)
    prompts = [ids[~mask].tolist() for ids, mask in (rated.examples[i] for i in range(9))]
    answers = [ids[mask].tolist() for ids, mask in (rated.examples[i] for i in range(9))]
    used = []
    for i in range(9):
        ids, _ = others.examples[i]
        assert ids[: len(prompts[i])].tolist() == prompts[i]
        rest = ids[len(prompts[i]) :].tolist()
        source = next(j for j, answer in enumerate(answers) if answer[: len(rest)] == rest)
        assert source != i
        used.append(source)
    assert sorted(used) == list(range(9))
    with pytest.raises(ValueError, match="there is only 1 example"):
        mismatched(rated.take([0]), seed=0)


def test_desirable_responses_gain_and_undesirable_ones_lose(tiny, rated):
    graphdef, policy, _ = tiny
    before = trained((graphdef, policy, policy), rated, microbatches=1, steps=1)[1]
    after = trained((graphdef, policy, policy), rated, microbatches=1, steps=20, rate=1e-2)[1]
    assert after["rewards/chosen"] > before["rewards/chosen"] + 0.5
    assert after["rewards/rejected"] < before["rewards/rejected"] - 0.5
    assert np.isfinite(after["loss"]) and after["loss"] < 0.3
