"""PPO: one update replayed in float64 from its definitions, its controls by hand, and cuts that change nothing."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxalign.algorithms.critic import token_values
from jaxalign.algorithms.memory import Spread, next_kl_coef
from jaxalign.algorithms.ppo import ppo
from jaxalign.config.on_policy import PPOAlgorithm
from jaxalign.losses import ppo_clip
from jaxalign.models import places
from jaxalign.ops.logprobs import next_token_logps
from jaxalign.training import sharding
from jaxalign.training.state import TrainState
from jaxalign.training.step import make_train_step
from jaxalign.types import Average, TokenBatch

LAMBDA, KL_COEF, VALUE_COEF, ENTROPY_COEF, PRETRAINING_COEF = 0.9, 0.3, 0.5, 0.02, 0.7
LONGEST = 7  # tokens of the longest possible response


@pytest.fixture(scope="module")
def params(tiny):
    """The policy, and a critic whose trunk is the reference's, so that its values differ from the policy's."""
    head = jax.random.normal(jax.random.key(2), (1, 32)) / 6
    return {"policy": tiny[1], "critic": {"model": tiny[2], "head": head, "bias": jnp.array([0.2])}}


@pytest.fixture(scope="module")
def text():
    """Sixteen rows of other text, two sequences in each."""
    tokens = np.random.default_rng(3).integers(3, 30, (16, 10)).astype(np.int32)
    segments = np.where(np.arange(10) < 4, 1, 2).astype(np.int32).repeat(1)[None].repeat(16, 0)
    positions = np.where(np.arange(10) < 4, np.arange(10), np.arange(10) - 4).astype(np.int32)[None].repeat(16, 0)
    mask = positions > 0
    return jax.tree.map(jnp.asarray, TokenBatch(tokens, mask, positions, segments))


def algorithm_of(tiny, **options):
    settings = {"kl_coef": KL_COEF, "gae_lambda": LAMBDA, "value_coef": VALUE_COEF, "epochs": 1} | options
    return ppo(PPOAlgorithm(**settings), tiny[0], tiny[0], tiny[0], loss=ppo_clip, longest=LONGEST)


@pytest.fixture(scope="module")
def dumped(tiny, params, rolled_out):
    """Outputs of the models, as float64 numpy: log π, log π_ref, entropies, the critic's hidden states."""

    @jax.jit
    def run(policy, reference):
        rows, outputs = rolled_out.sequences, []
        for weights in (policy, reference):
            model = nnx.merge(tiny[0], weights)
            hidden = model(rows.tokens, positions=rows.positions, segment_ids=rows.segment_ids)
            scored = next_token_logps(hidden, model.unembed(), rows.tokens, rows.mask, entropy=True)
            outputs.append((scored.logps, scored.entropy, hidden))
        return outputs

    (logps, entropy, _), (ref_logps, _, critic_hidden) = run(tiny[1], tiny[2])
    return [np.asarray(x, np.float64) for x in (logps, ref_logps, entropy, critic_hidden)]


def replay(batch, critic, dumped, *, clip_epsilon=0.2):
    """One PPO update from its definitions, token by token: (advantages, returns, values, losses, gradients)."""
    logps, ref, entropy, hidden = dumped
    mask, old = np.asarray(batch.sequences.mask), np.asarray(batch.columns["old_logps"], np.float64)
    scores = np.asarray(batch.columns["scores"], np.float64)
    head, bias = np.asarray(critic["head"], np.float64)[0], float(critic["bias"][0])
    values, advantages, returns = (np.zeros(mask.shape) for _ in range(3))
    for row in range(len(mask)):
        places = np.flatnonzero(mask[row])
        ahead = 0.0
        for t in places:
            values[row, t] = hidden[row, t - 1] @ head + bias
        for number, t in reversed(list(enumerate(places))):
            last = number == len(places) - 1
            reward = -KL_COEF * (old[row, t] - ref[row, t]) + (scores[row] if last else 0.0)
            following = 0.0 if last else values[row, places[number + 1]]
            ahead = reward + following - values[row, t] + LAMBDA * ahead
            advantages[row, t] = ahead
            returns[row, t] = ahead + values[row, t]
    raw = advantages[mask]
    white = np.where(mask, (advantages - raw.mean()) / np.sqrt(raw.var(ddof=1) + 1e-8), 0.0)
    ratio = np.exp(np.where(mask, logps - old, 0.0))
    unclipped, clipped = -ratio * white, -np.clip(ratio, 1 - clip_epsilon, 1 + clip_epsilon) * white
    count = mask.sum()
    losses = {
        "policy_loss": np.maximum(unclipped, clipped)[mask].sum() / count,
        "value_loss": 0.5 * ((values - returns) ** 2)[mask].sum() / count,  # values are those of the rollout: no clip
        "entropy": entropy[mask].sum() / count,
        "explained_variance": 1 - (returns - values)[mask].var() / returns[mask].var(),
    }
    from_logps = np.where(mask & (unclipped >= clipped), -ratio * white, 0.0) / count
    from_values = np.where(mask, values - returns, 0.0) / count
    shifted = np.pad(hidden[:, :-1], ((0, 0), (1, 0), (0, 0)))
    from_head = VALUE_COEF * np.einsum("bt,btd->d", from_values, shifted)
    return white, returns, values, losses, (from_logps, from_head, VALUE_COEF * from_values.sum())


def test_one_update_is_that_of_a_replay_in_float64(tiny, params, rolled_out, dumped):
    algorithm = algorithm_of(tiny)

    def loss_of(params, batch):
        loss, metrics = algorithm.loss(params, batch)
        return loss.compute(), metrics

    @jax.jit
    def run(params, reference):
        batch = algorithm.prepare(params, reference, rolled_out)
        _, batch = algorithm.remember({}, batch)
        batch = algorithm.across(batch)
        grads, metrics = jax.grad(loss_of, has_aux=True)(params, batch)
        total, _ = algorithm.loss(params, batch)
        return batch, grads, total.compute(), {name: average.compute() for name, average in metrics.items()}

    batch, grads, total, metrics = run(params, tiny[2])
    advantages, returns, values, losses, (from_logps, from_head, from_bias) = replay(
        rolled_out, params["critic"], dumped
    )
    for name, expected in (("advantages", advantages), ("returns", returns), ("old_values", values)):
        np.testing.assert_allclose(batch.columns[name], expected, atol=2e-5, err_msg=name)
    for name, expected in losses.items():
        assert metrics[name] == pytest.approx(expected, abs=2e-5), name
    assert total == pytest.approx(losses["policy_loss"] + VALUE_COEF * losses["value_loss"], abs=2e-5)
    np.testing.assert_allclose(grads["critic"]["head"][0], from_head, atol=2e-6)
    np.testing.assert_allclose(grads["critic"]["bias"][0], from_bias, atol=2e-6)
    assert np.abs(from_head).max() > 1e-2

    def logps_of(policy):
        model, rows = nnx.merge(tiny[0], policy), rolled_out.sequences
        hidden = model(rows.tokens, positions=rows.positions, segment_ids=rows.segment_ids)
        return next_token_logps(hidden, model.unembed(), rows.tokens, rows.mask).logps

    (expected,) = jax.jit(lambda p: jax.vjp(logps_of, p)[1](jnp.asarray(from_logps, jnp.float32)))(params["policy"])
    norm = optax.tree.norm(expected)
    assert optax.tree.norm(grads["policy"]) == pytest.approx(float(norm), rel=1e-5) and norm > 1e-2
    chex.assert_trees_all_close(grads["policy"], expected, atol=1e-6)


def metrics_of(tiny, params, batch, carry=None, **options):
    """(columns that the loss sees, what it says), without an update."""
    algorithm = algorithm_of(tiny, **options)

    @jax.jit
    def run(params, reference):
        _, seen = algorithm.remember(
            algorithm.carry if carry is None else carry, algorithm.prepare(params, reference, batch)
        )
        seen = algorithm.across(seen)
        loss, metrics = algorithm.loss(params, seen)
        return seen.columns, {"loss": loss.compute()} | {name: average.compute() for name, average in metrics.items()}

    columns, metrics = run(params, tiny[2])
    return columns, {name: float(value) for name, value in metrics.items()}


def trl_whitened(values, mask, shift_mean=True):
    """masked_whiten of TRL's PPO."""
    mean = (values * mask).sum() / mask.sum()
    variance = ((values - mean) ** 2 * mask).sum() / mask.sum() * mask.sum() / (mask.sum() - 1)
    return (values - mean) / np.sqrt(variance + 1e-8) + (0.0 if shift_mean else mean)


def trl_update(batch, logps, ref, new_logps, values, *, whiten_rewards):
    """(returns, advantages, policy loss, value loss) by TRL 1.12's ppo_trainer.py, lines 757 to 847, one batch.

    In its layout, responses only, padded on the right to the longest possible; `values` as far as there is room.
    """
    mask, scores = np.asarray(batch.sequences.mask), np.asarray(batch.columns["scores"], np.float64)
    rows = [row for row in range(len(mask)) if mask[row].any()]
    starts, lengths = mask.argmax(1)[rows], mask.sum(1)[rows]

    def laid_out(array):
        return np.stack([array[row, at : at + LONGEST] for row, at in zip(rows, starts, strict=True)])

    padded = (
        np.pad(values, ((0, 0), (0, LONGEST))),
        *(np.pad(x, ((0, 0), (0, LONGEST))) for x in (logps, ref, new_logps)),
    )
    values, logps, ref, new_logps = map(laid_out, padded)
    places, last = np.arange(LONGEST)[None], lengths[:, None] - 1
    padding, padding_p1 = places > last, places > last + 1
    logps, ref, new_logps = (np.where(padding, 1.0, x) for x in (logps, ref, new_logps))
    values = np.where(padding_p1, 0.0, values)
    log_ratio = ref - logps
    rewards = -KL_COEF * (np.exp(log_ratio) - 1 - log_ratio)
    end = np.where(lengths < LONGEST, lengths, lengths - 1)
    rewards[np.arange(len(rows)), end] += scores[rows]
    if whiten_rewards:
        rewards = np.where(padding_p1, 0.0, trl_whitened(rewards, ~padding_p1, shift_mean=False))
    advantages, ahead = np.zeros_like(rewards), 0.0
    for t in reversed(range(LONGEST)):
        following = values[:, t + 1] if t < LONGEST - 1 else 0.0
        ahead = rewards[:, t] + following - values[:, t] + LAMBDA * ahead
        advantages[:, t] = ahead
    returns = advantages + values
    advantages = np.where(padding, 0.0, trl_whitened(advantages, ~padding))
    ratio = np.exp(new_logps - logps)
    losses = np.maximum(-advantages * ratio, -advantages * np.clip(ratio, 0.8, 1.2))
    policy_loss = (losses * ~padding).sum() / (~padding).sum()
    value_loss = 0.5 * ((values - returns) ** 2 * ~padding_p1).sum() / (~padding_p1).sum()
    return (returns, ~padding_p1, starts), (advantages, ~padding, starts), policy_loss, value_loss


@pytest.mark.parametrize("whiten_rewards", [False, True])
def test_named_options_give_the_numbers_of_trl(whiten_rewards, tiny, params, rolled_out, dumped):
    critic = {name: params["critic"][name] for name in ("head", "model")}  # `critic.bias` off
    options = {"score_at": "after", "kl_estimator": "k3", "whiten_rewards": whiten_rewards}
    columns, metrics = metrics_of(tiny, params | {"critic": critic}, rolled_out, **options)
    logps, ref, _, hidden = dumped
    values = np.pad(hidden[:, :-1] @ np.asarray(critic["head"], np.float64)[0], ((0, 0), (1, 0)))
    old = np.asarray(rolled_out.columns["old_logps"], np.float64)
    returns, advantages, policy_loss, value_loss = trl_update(
        rolled_out, old, ref, logps, values, whiten_rewards=whiten_rewards
    )
    for name, (expected, there, starts) in {"returns": returns, "advantages": advantages}.items():
        for row, at in enumerate(starts):
            count = there[row].sum()
            np.testing.assert_allclose(columns[name][row, at : at + count], expected[row, :count], atol=2e-5)
    assert metrics["policy_loss"] == pytest.approx(policy_loss, abs=2e-5)
    assert metrics["value_loss"] == pytest.approx(value_loss, abs=2e-5)
    assert metrics["loss"] == pytest.approx(policy_loss + VALUE_COEF * value_loss, abs=2e-5)


def test_a_critic_on_the_policys_trunk_reads_its_hidden_states(tiny, params, rolled_out, dumped):
    shared = params | {"critic": {name: params["critic"][name] for name in ("head", "bias")}}
    own = params | {"critic": shared["critic"] | {"model": tiny[1]}}
    one, _ = metrics_of(tiny, shared, rolled_out)
    two, _ = metrics_of(tiny, own, rolled_out)
    np.testing.assert_allclose(one["old_values"], two["old_values"], atol=1e-5)
    assert np.abs(one["old_values"]).max() > 0.1


def test_the_kl_in_the_loss_is_not_in_the_reward(tiny, params, rolled_out):
    free, plain = metrics_of(tiny, params, rolled_out, kl_coef=0.0)
    paid, metrics = metrics_of(tiny, params, rolled_out, kl_in="loss", kl_estimator="k3")
    np.testing.assert_allclose(paid["returns"], free["returns"], atol=1e-6)
    mask = np.asarray(rolled_out.sequences.mask)
    assert metrics["loss"] > plain["loss"] + 0.01
    assert metrics["kl_coef"] == pytest.approx(KL_COEF)
    rewarded, _ = metrics_of(tiny, params, rolled_out)
    assert np.abs(np.asarray(rewarded["returns"] - free["returns"])[mask]).max() > 0.1


def test_pretraining_adds_its_mean_cross_entropy_once(tiny, params, rolled_out, text):
    both = dataclasses.replace(rolled_out, pretraining=text)
    _, without = metrics_of(tiny, params, rolled_out, entropy_coef=ENTROPY_COEF)
    _, metrics = metrics_of(tiny, params, both, entropy_coef=ENTROPY_COEF, pretraining_coef=PRETRAINING_COEF)
    assert metrics["loss"] == pytest.approx(without["loss"] + PRETRAINING_COEF * metrics["pretraining_loss"], abs=1e-5)
    _, bare = metrics_of(tiny, params, rolled_out)
    assert without["loss"] == pytest.approx(bare["loss"] - ENTROPY_COEF * bare["entropy"], abs=1e-6)


def test_scores_are_normalised_by_all_so_far_then_clipped():
    present, first, second = jnp.array([True, True, True, False]), [1.0, 2.0, 6.0, 99.0], [0.0, -5.0, 3.0, 99.0]
    spread = Spread.start().seen(jnp.array(first), present).seen(jnp.array(second), present)
    scores = np.array(first[:3] + second[:3])
    assert float(spread.mean) == pytest.approx(scores.mean())
    assert float(spread.std()) == pytest.approx(scores.std(ddof=1))
    np.testing.assert_allclose(
        spread.normalised(jnp.array(second))[:3], (scores[3:] - scores.mean()) / scores.std(ddof=1), 1e-6
    )
    assert Spread.start().seen(jnp.array([4.0]), jnp.array([True])).normalised(jnp.array([4.0]))[0] == 0
    for count in (3, 7, 8):  # of equal scores the mean may be a rounding off them, which is no spread
        equal = jnp.full(count, 0.7)
        alike = Spread.start().seen(equal, equal > 0).seen(equal, equal > 0)
        assert alike.std() == 1 and not alike.normalised(equal).any()


def test_clipped_scores_are_what_the_critic_sees_and_the_given_ones_are_logged(tiny, params, rolled_out):
    columns, metrics = metrics_of(tiny, params, rolled_out, normalise_scores=True, clip_scores=0.5)
    scores = np.asarray(rolled_out.columns["scores"])[:15].astype(np.float64)
    expected = np.clip((scores - scores.mean()) / scores.std(ddof=1), -0.5, 0.5)
    np.testing.assert_allclose(np.asarray(columns["rewarded_scores"])[:15], expected, atol=1e-5)
    assert metrics["score"] == pytest.approx(scores.mean(), abs=1e-6)


@pytest.mark.parametrize(("kl", "factor"), [(6.0, 1.0), (6.6, 1.01), (60.0, 1.02), (0.0, 0.98)])
def test_the_kl_coefficient_moves_by_a_tenth_of_the_error_and_two_percent_at_most(kl, factor):
    coef = next_kl_coef(jnp.float32(0.2), jnp.float32(kl), target=6.0)
    assert float(coef) == pytest.approx(0.2 * factor, rel=1e-5)


def stepped(tiny, params, batch, *, microbatches=1, sizes=None, steps=1, rate=0.5, **options):
    optimizer = optax.sgd(rate)
    algorithm = algorithm_of(tiny, **options)
    step = make_train_step(algorithm, optimizer, microbatches=microbatches)
    state = TrainState.create(jax.tree.map(jnp.copy, params), optimizer, jax.random.key(0), carry=algorithm.carry)
    frozen = tiny[2]
    if sizes is None:
        step = jax.jit(step)
    else:
        mesh = places.make_mesh(**sizes)
        step = sharding.jit_step(step, state, frozen, mesh)
        state = jax.device_put(state, places.shardings(state, mesh))
        frozen = jax.device_put(frozen, places.shardings(frozen, mesh))
        batch = sharding.put_batch(jax.device_get(batch), mesh)
    for _ in range(steps):
        state, metrics = step(state, frozen, batch)
    return jax.device_get(state), jax.device_get(metrics)


EVERYTHING = {
    "normalise_scores": True,
    "clip_scores": 2.0,
    "kl_target": 6.0,
    "whiten_rewards": True,
    "entropy_coef": ENTROPY_COEF,
    "pretraining_coef": PRETRAINING_COEF,
    "epochs": 2,
    "minibatches": 2,
    "halt_kl": 10.0,
}


def test_microbatches_and_meshes_give_the_same_state(tiny, params, rolled_out, text):
    batch = dataclasses.replace(rolled_out, pretraining=text)
    options = EVERYTHING | {"rate": 0.05}
    expected, metrics = stepped(tiny, params, batch, **options)
    assert metrics["updates"] == 4
    moved = jax.tree.map(lambda new, old: float(np.abs(new - np.asarray(old)).max()), expected.params, params)
    assert min(moved["policy"]["blocks"]["mlp"]["gate"]["kernel"], moved["critic"]["head"]) > 1e-3
    sizes = {"data": 2, "fsdp": 2, "tensor": 2}
    state, _ = stepped(tiny, params, batch, microbatches=2, sizes=sizes, **options)
    chex.assert_trees_all_close((state.params, state.carry), (expected.params, expected.carry), atol=1e-5)


@pytest.mark.parametrize(("approx_kl", "halts"), [(0.14, False), (0.16, True)])
def test_updates_halt_beyond_one_and_a_half_times_the_kl(tiny, approx_kl, halts):
    averages = {"approx_kl": Average.of(jnp.array([approx_kl]))}
    assert bool(algorithm_of(tiny, halt_kl=0.1).halt(averages)) == halts


def test_values_are_about_the_token_that_follows_what_they_read():
    hidden = jnp.arange(6.0).reshape(1, 3, 2)
    values = token_values({"head": jnp.array([[1.0, 10.0]]), "bias": jnp.array([0.5])}, hidden)
    np.testing.assert_allclose(values, [[0.0, 10.5, 32.5]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_estimator": "k4"}, "`algorithm.kl_estimator` 'k4' is not one of 'k1', 'k2', 'k3'"),
        ({"kl_in": "score"}, "is not one of 'reward', 'loss'"),
        ({"kl_in": "loss"}, "needs `algorithm.kl_estimator` k2 or k3"),
        ({"kl_coef": -1.0}, "must be at least 0"),
        ({"kl_target": 0.0}, "`algorithm.kl_target` 0.0: it must be above 0"),
        ({"kl_target": 6.0, "kl_coef": 0.0}, "must be above 0"),
    ],
)
def test_what_cannot_be_is_refused(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        algorithm_of(tiny, **options)
