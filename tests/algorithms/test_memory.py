"""Running means: by hand, and what BCO and β-DPO make of two batches that follow each other."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxalign.algorithms import memory
from jaxalign.algorithms.pairwise import pairwise
from jaxalign.algorithms.unpaired import unpaired
from jaxalign.data.batches.groups import BatchShapes
from jaxalign.data.batches.plan import Plan
from jaxalign.losses import PAIR, UNPAIRED, contract, select_loss
from jaxalign.models.reading import LOGPS, response_logps
from jaxalign.training.state import TrainState
from jaxalign.training.step import make_train_step
from jaxalign.types import Average, UnpairedBatch
from tests.algorithms.shared import make_responses


def after(batches, momentum):
    momenta = {"running_margin": momentum}
    carry = memory.start_means(momenta)
    for values in batches:
        carry = memory.advance_means(carry, {"mean_margin": Average.of(jnp.array(values))}, momenta)
    return float(carry["running_margin"].compute())


def test_without_momentum_every_element_of_every_batch_weighs_the_same():
    assert after([[1.0, 2.0, 3.0], [10.0]], None) == 4.0


def test_with_momentum_the_mean_starts_at_zero_and_a_batch_moves_it_by_the_rest():
    assert after([[4.0], [8.0]], 0.75) == pytest.approx(0.75 * (0.25 * 4) + 0.25 * 8)


def test_with_momentum_zero_it_is_the_mean_of_the_batch():
    assert after([[4.0], [8.0, 6.0]], 0.0) == 7.0


@pytest.mark.parametrize("momentum", [None, 0.5])
def test_a_batch_without_such_elements_moves_nothing(momentum):
    assert after([[4.0], []], momentum) == after([[4.0]], momentum)


def test_each_term_of_a_sum_has_its_own_momentum():
    loss = select_loss("bco_pair + 0.5*beta_dpo(momentum=0.8)", PAIR)
    assert contract.momenta(loss) == {"running_log_ratio": None, "running_margin": 0.8}
    assert contract.momenta(select_loss("dpo", PAIR)) == {}


def log_ratios(tiny, batch):
    """[pairs or responses, K], and which rows and groups they are of."""
    graphdef, policy, reference = tiny
    logps = [response_logps(nnx.merge(graphdef, params), batch)[LOGPS] for params in (policy, reference)]
    return np.asarray(logps[0] - logps[1])[np.asarray(batch.valid)]


def steps_without_learning(tiny, algorithm, batches):
    optimizer = optax.sgd(0.0)
    step = jax.jit(make_train_step(algorithm, optimizer, microbatches=2))
    state = TrainState.create(tiny[1], optimizer, jax.random.key(0), carry=algorithm.carry)
    for batch in batches:
        state, metrics = step(state, tiny[2], batch)
    return state, metrics


@pytest.fixture(scope="module")
def batches():
    groups = [make_responses(8, k=2, seed=seed) for seed in (1, 2)]
    return [jax.tree.map(jnp.asarray, BatchShapes.of(x, Plan(8, 20, packing=False)).batch(x)) for x in groups]


def test_two_steps_of_bco_pair_and_beta_dpo_are_their_formulas_with_means_of_both_batches(tiny, batches):
    first, second = (log_ratios(tiny, batch) for batch in batches)
    margins = [x[:, 0] - x[:, 1] for x in (first, second)]
    shift = 0.1 * np.concatenate([first, second]).mean()
    moving = 0.9 * (0.1 * margins[0].mean()) + 0.1 * margins[1].mean()
    beta = (1 + 0.6 * 0.1 * (margins[1].mean() - moving)) * 0.1

    def softplus(x):
        return np.log1p(np.exp(-x))

    bco = softplus(0.1 * second[:, 0] - shift) + softplus(shift - 0.1 * second[:, 1])
    algorithm = pairwise(tiny[0], tiny[0], loss=select_loss("bco_pair + 10*beta_dpo", PAIR))
    state, metrics = steps_without_learning(tiny, algorithm, batches)
    assert metrics["loss"] == pytest.approx((bco + 10 * softplus(beta * margins[1])).mean(), abs=1e-4)
    assert state.carry["running_margin"].compute() == pytest.approx(moving, abs=1e-4)


def test_two_steps_of_bco_shift_by_the_middle_of_both_classes_over_both_batches(tiny):
    groups = [make_responses(8, k=1, seed=seed) for seed in (1, 2)]
    plan = Plan(8, 20, packing=False)
    rated = [jax.tree.map(jnp.asarray, BatchShapes.of(x, plan).batch(x)) for x in groups]
    ratios = np.concatenate([log_ratios(tiny, batch)[:, 0] for batch in rated])
    labels = np.concatenate([x.columns["label"] for x in groups])
    middle = (ratios[labels].mean() + ratios[~labels].mean()) / 2
    logits = np.where(labels, 1, -1) * 0.1 * (ratios - middle)
    algorithm = unpaired(tiny[0], tiny[0], loss=select_loss("bco", UNPAIRED))
    _, metrics = steps_without_learning(tiny, algorithm, [UnpairedBatch(batch, batch) for batch in rated])
    assert metrics["loss"] == pytest.approx(np.log1p(np.exp(-logits[8:])).mean(), abs=1e-5)
