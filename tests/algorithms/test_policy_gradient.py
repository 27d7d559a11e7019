"""Policy gradients: the papers' means by hand, and the same whatever the microbatches, the minibatches and the mesh."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxalign.algorithms.policy_gradient import policy_gradient
from jaxalign.config.on_policy import GRPOAlgorithm
from jaxalign.losses import ppo_clip
from jaxalign.mistake import Mistake
from jaxalign.models import places
from jaxalign.ops.logprobs import next_token_logps
from jaxalign.training import sharding
from jaxalign.training.state import TrainState
from jaxalign.training.step import make_train_step

COUNT = 16


@pytest.fixture(scope="module")
def batch(rolled_out):
    return rolled_out


@pytest.fixture(scope="module")
def logps(tiny, batch):
    """log π of every token under the policy and the reference, float64 numpy."""

    @jax.jit
    def score(params):
        model, rows = nnx.merge(tiny[0], params), batch.sequences
        hidden = model(rows.tokens, positions=rows.positions, segment_ids=rows.segment_ids)
        return next_token_logps(hidden, model.unembed(), rows.tokens, rows.mask).logps

    return [np.asarray(score(params), np.float64) for params in tiny[1:]]


def algorithm_of(tiny, *, longest=None, corrected=False, loss=ppo_clip, **settings):
    config = GRPOAlgorithm(**settings)
    return policy_gradient(config, tiny[0], tiny[0], loss=loss, longest=longest, corrected=corrected)


def loss_of(tiny, batch, **options):
    algorithm = algorithm_of(tiny, **options)

    @jax.jit
    def run(policy, reference):
        loss, metrics = algorithm.loss(policy, algorithm.prepare(policy, reference, batch))
        return {"loss": loss.compute()} | {name: average.compute() for name, average in metrics.items()}

    return {name: float(value) for name, value in run(*tiny[1:]).items()}


def replayed(batch, policy, reference, *, aggregate, level, kl_coef):
    """The clipped surrogate and k3 from their definitions."""
    mask = np.asarray(batch.sequences.mask)
    old, gains = (np.asarray(batch.columns[name], np.float64) for name in ("old_logps", "advantages"))
    gap = np.where(mask, policy - old, 0)
    if level == "sequence":
        gap = np.where(mask, gap.sum(1, keepdims=True) / np.maximum(mask.sum(1, keepdims=True), 1), 0)
    ratio = np.exp(gap)
    values = np.maximum(-ratio * gains, -np.clip(ratio, 0.8, 1.2) * gains)
    values = values + kl_coef * (np.exp(reference - policy) - 1 + policy - reference)
    values, lengths = np.where(mask, values, 0), mask.sum(1)
    if aggregate == "token":
        return values.sum() / mask.sum()
    per_row = values.sum(1)[:-1] / (lengths[:-1] if aggregate == "sequence" else 7)
    return per_row.mean()


@pytest.mark.parametrize("aggregate", ["token", "sequence", "fixed"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_losses_are_those_of_a_replay_in_float64(tiny, batch, logps, aggregate, level):
    options = {"aggregate": aggregate, "level": level, "kl_coef": 0.3}
    metrics = loss_of(tiny, batch, longest=7, **options)
    assert metrics["loss"] == pytest.approx(replayed(batch, *logps, **options), abs=2e-6)
    mask = np.asarray(batch.sequences.mask)
    drawn = np.asarray(batch.columns["old_logps"], np.float64)
    assert metrics["kl"] == pytest.approx((drawn - logps[1])[mask].sum() / (COUNT - 1), abs=2e-5)
    assert metrics["entropy"] == pytest.approx(-logps[0][mask].mean(), abs=2e-5)
    assert metrics["length"] == pytest.approx(mask.sum() / (COUNT - 1), rel=1e-6)


def stepped(tiny, batch, *, microbatches, sizes=None, **options):
    optimizer = optax.sgd(0.5)  # linear in the gradient: Adam magnifies rounding where a gradient is near 0
    algorithm = algorithm_of(tiny, kl_coef=0.1, aggregate="sequence", **options)
    step = make_train_step(algorithm, optimizer, microbatches=microbatches)
    state = TrainState.create(jax.tree.map(jnp.copy, tiny[1]), optimizer, jax.random.key(0))
    frozen = tiny[2]
    if sizes is None:
        step = jax.jit(step)
    else:
        mesh = places.make_mesh(**sizes)
        step = sharding.jit_step(step, state, frozen, mesh)
        state = jax.device_put(state, places.shardings(state, mesh))
        frozen = jax.device_put(frozen, places.shardings(frozen, mesh))
        batch = sharding.put_batch(jax.device_get(batch), mesh)
    state, metrics = step(state, frozen, batch)
    return jax.device_get(state.params), jax.device_get(metrics)


def test_microbatches_and_meshes_give_the_same_parameters(tiny, batch):
    expected, _ = stepped(tiny, batch, microbatches=1)
    moved = jax.tree.map(lambda new, old: float(np.abs(new - np.asarray(old)).max()), expected, tiny[1])
    assert moved["blocks"]["mlp"]["gate"]["kernel"] > 1e-3
    params, _ = stepped(tiny, batch, microbatches=2, sizes={"data": 2, "fsdp": 2, "tensor": 2})
    chex.assert_trees_all_close(params, expected, atol=1e-5)


def test_epochs_and_minibatches_are_updates_and_the_second_has_ratios(tiny, batch, logps):
    on_policy = batch.__class__(batch.sequences, {**batch.columns, "old_logps": jnp.asarray(logps[0], jnp.float32)})
    _, once = stepped(tiny, on_policy, microbatches=1)
    assert once["ratio"] == pytest.approx(1.0, abs=1e-5) and once["clip_fraction"] == 0
    _, twice = stepped(tiny, on_policy, microbatches=1, epochs=2, minibatches=2)
    assert abs(twice["ratio"] - 1) > 1e-4 and twice["approx_kl"] > 1e-6


def test_tokens_of_another_distribution_are_weighted_and_the_first_ratio_is_one(tiny, batch, logps):
    """Drawn at 1/0.8 of the policy's probability they weigh 0.8, at half of it 2 and at a quarter the cap of 3."""
    gap = np.log(np.array([0.8, 2.0, 4.0]))[
        np.arange(batch.sequences.mask.size).reshape(batch.sequences.mask.shape) % 3
    ]
    columns = {**batch.columns, "old_logps": jnp.asarray(logps[0] - gap, jnp.float32)}
    metrics = loss_of(tiny, batch.__class__(batch.sequences, columns), corrected=True, importance_cap=3.0, kl_coef=0.3)
    mask, weights = np.asarray(batch.sequences.mask), np.minimum(np.exp(gap), 3.0)
    gains = np.asarray(batch.columns["advantages"], np.float64)
    values = weights * (-gains + 0.3 * (np.exp(logps[1] - logps[0]) - 1 + logps[0] - logps[1]))
    assert metrics["loss"] == pytest.approx(values[mask].mean(), abs=1e-5)
    assert metrics["importance_weight"] == pytest.approx(weights[mask].mean(), abs=1e-5)
    assert metrics["ratio"] == pytest.approx(1.0, abs=1e-6) and metrics["clip_fraction"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_estimator": "k4"}, "`algorithm.kl_estimator` 'k4' is not one of 'k2', 'k3'"),
        ({"aggregate": "mean"}, "is not one of 'token', 'sequence', 'fixed'"),
        ({"level": "word"}, "is not one of 'token', 'sequence'"),
        ({"kl_coef": -1.0}, "must be at least 0"),
        ({"kl_coef": 0.1}, "needs the reference"),
        ({"aggregate": "fixed"}, "give longest="),
        ({"importance_cap": 0.0}, "must be above 0"),
    ],
)
def test_what_cannot_be_is_refused(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        policy_gradient(GRPOAlgorithm(**options), tiny[0], loss=ppo_clip)


def test_a_loss_of_ones_own_has_the_reference_where_there_is_one(tiny, batch, logps):
    def to_reference(logps, ref_logps, mask):
        return jnp.where(mask, logps - ref_logps, jnp.nan)

    mask = np.asarray(batch.sequences.mask)
    metrics = loss_of(tiny, batch, loss=to_reference)
    assert metrics["loss"] == pytest.approx((logps[0] - logps[1])[mask].mean(), abs=1e-5)
    with pytest.raises(Mistake, match="to_reference needs the reference; leave"):
        policy_gradient(GRPOAlgorithm(), tiny[0], loss=to_reference)
