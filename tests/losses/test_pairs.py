import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.losses import PAIR, PAIR_LOSSES, dpo, mixture, select_loss
from jaxalign.losses.contract import PAIR_INPUTS, apply, check_inputs, input_names, needs_reference, needs_whole_batch
from jaxalign.losses.pairs.adaptive import wpo_weights
from jaxalign.losses.pairs.divergences import alpha_divergence

LOG2 = np.log(2)


def pair(chosen=0.0, rejected=0.0, **others):
    """One pair whose log-ratios are as given; the reference gives both responses -20 nats over 10 tokens."""

    def one(x):
        return jnp.array([x], jnp.float32)

    values = {"ref_chosen_logps": one(-20.0), "ref_rejected_logps": one(-20.0)}
    values |= {"policy_chosen_logps": one(-20.0 + chosen), "policy_rejected_logps": one(-20.0 + rejected)}
    for name in ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected"):
        values[f"{name}_public_logps"] = values[f"{name}_logps"]
    values |= {"chosen_lengths": jnp.array([10]), "rejected_lengths": jnp.array([10])}
    values |= {"policy_chosen_collision_logps": one(-20.0), "policy_rejected_collision_logps": one(-20.0)}
    values |= {"mean_chosen_length": jnp.array(10.0)}
    values |= {name: jnp.array(0.0) for name in ("mean_margin", "running_log_ratio", "running_margin")}
    return values | others


def value(text, **others):
    return float(apply(select_loss(text, PAIR), pair(**others))[0])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dpo", LOG2),
        ("robust(label_smoothing=0.3)", LOG2),
        ("ipo(beta=0.1)", 25.0),
        ("hinge", 1.0),
        ("exo_pair(label_smoothing=0.1)", -np.log(2 * np.sqrt(0.1 * 0.9))),
        ("discopop", (LOG2 + 1) / 2),
        ("nca_pair", 2 * LOG2),
        ("bco_pair", 2 * LOG2),
        ("sppo_hard(beta=0.5)", 2.0),
        ("apo_zero", 0.0),
        ("apo_down", 0.0),
        ("dpop", LOG2),
        ("sigmoid_norm", LOG2),
        ("rdpo(alpha=0.3)", LOG2),
        ("ld_dpo", LOG2),
        ("beta_dpo", LOG2),
        ("wpo", LOG2),
        ("wpo_unaligned", np.exp(-4.0) * LOG2),
        ("aot", LOG2),
        ("aot_unpaired", LOG2),
        ("dpo_forward_kl", LOG2),
        ("dpo_js", LOG2),
        ("dpo_alpha", LOG2),
        ("sft", 2.0),
        ("sft_norm", 2.0),
        ("simpo(gamma=1.0)", np.log1p(np.e)),
        ("cpo", LOG2 + 20.0),
        ("slic(delta=3.0)", 3.0),
    ],
)
def test_landmarks_where_policy_and_reference_agree(text, expected):
    np.testing.assert_allclose(value(text), expected, rtol=1e-5, atol=1e-7)


def test_orpo_at_even_odds_is_log_2_for_each_term():
    half = jnp.array([10 * np.log(0.5)], jnp.float32)
    loss = value("orpo(odds_coef=0.5)", policy_chosen_logps=half, policy_rejected_logps=half)
    np.testing.assert_allclose(loss, 1.5 * LOG2, rtol=1e-5)


def test_dpo_by_hand():
    np.testing.assert_allclose(value("dpo(beta=0.5)", chosen=3.0, rejected=1.0), np.log1p(np.exp(-1.0)), rtol=1e-6)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_a_likelier_chosen_response_lowers_the_loss(name):
    if name == "apo_down":
        pytest.skip("it lowers both responses on purpose; its own test below")
    # discopop is not monotone for nearly even pairs: it is asked about a pair won by a nat's reward
    loss, at = PAIR_LOSSES[name], pair(20.0, 0.0) if name == "discopop" else pair(0.2, 0.1)
    slope = jax.grad(lambda x: apply(loss, at | {"policy_chosen_logps": x}).sum())(at["policy_chosen_logps"])
    assert slope[0] < 0


def test_apo_down_moves_both_down_from_a_won_pair():
    at = pair(2.0, -2.0)
    logps = {name: at[name] for name in ("policy_chosen_logps", "policy_rejected_logps")}
    slopes = jax.grad(lambda logps: apply(PAIR_LOSSES["apo_down"], at | logps).sum())(logps)
    assert all(slope[0] > 0 for slope in slopes.values())


@pytest.mark.parametrize("name", PAIR_LOSSES)
@pytest.mark.parametrize(("chosen", "rejected"), [(1e4, -1e4), (-1e4, 1e4), (-1e4, -1e4), (20.0, 20.0)])
def test_extreme_log_ratios_stay_finite(name, chosen, rejected):
    at = pair(chosen, rejected)
    if not needs_reference(PAIR_LOSSES[name]):
        for side in ("policy_chosen_logps", "policy_rejected_logps"):
            at[side] = jnp.minimum(at[side], 0.0)  # a probability is at most 1
    if name.startswith("wpo"):  # a weight is a probability of the policy's, so log π must be one
        for side in ("chosen", "rejected"):
            shift = jnp.maximum(at[f"policy_{side}_logps"], 0.0)
            at[f"policy_{side}_logps"] -= shift
            at[f"ref_{side}_logps"] -= shift
    moving = {n: at[n] for n in ("policy_chosen_logps", "policy_rejected_logps")}
    total, slopes = jax.value_and_grad(lambda m: apply(PAIR_LOSSES[name], at | m).sum())(moving)
    assert np.isfinite(total) and all(np.isfinite(s).all() for s in slopes.values())


@pytest.mark.parametrize(
    ("reduced", "to"),
    [
        ("robust(label_smoothing=0.0)", "dpo"),
        ("dpop(beta=0.1, penalty_coef=0.0)", "dpo"),
        ("rdpo(alpha=0.0)", "dpo"),
        ("ld_dpo(alpha=1.0)", "dpo"),
        ("beta_dpo(alpha=0.0)", "dpo"),
        ("sigmoid_norm(beta=1.0)", "dpo(beta=0.1)"),
        ("aot", "dpo"),
        ("aot_unpaired", "dpo"),
        ("dpo_alpha(alpha=1.0)", "dpo_forward_kl"),
    ],
)
def test_identities_on_one_pair(reduced, to):
    np.testing.assert_allclose(
        value(reduced, chosen=1.2, rejected=-0.7), value(to, chosen=1.2, rejected=-0.7), rtol=1e-5
    )


def test_label_smoothing_of_one_half_does_not_know_which_was_chosen():
    there, back = (value("dpo(label_smoothing=0.5)", chosen=c, rejected=-c) for c in (2.0, -2.0))
    np.testing.assert_allclose(there, back, rtol=1e-6)


def test_robust_is_dpo_in_expectation_over_flipped_labels():
    right, flipped = (value("robust(label_smoothing=0.2)", chosen=c, rejected=-c) for c in (2.0, -2.0))
    np.testing.assert_allclose(0.8 * right + 0.2 * flipped, value("dpo", chosen=2.0, rejected=-2.0), rtol=1e-5)


def test_a_small_alpha_is_the_reverse_kl():
    x = jnp.array([-3.0, -0.1, 0.0, 2.0])
    np.testing.assert_allclose(alpha_divergence(x, alpha=1e-4), x, rtol=1e-3)


def test_aot_pairs_by_rank_whatever_the_order_of_rows():
    rows = {n: jnp.arange(4.0) * (i + 1) for i, n in enumerate(input_names(dpo))}
    order = jnp.array([2, 0, 3, 1])
    for name in ("aot", "aot_unpaired"):
        loss = PAIR_LOSSES[name]
        np.testing.assert_allclose(apply(loss, rows), apply(loss, {n: x[order] for n, x in rows.items()}), rtol=1e-6)
        assert needs_whole_batch(loss) and needs_whole_batch(functools.partial(loss, beta=0.5))
    assert not needs_whole_batch(dpo)


def test_sft_averages_over_tokens_and_sft_norm_over_responses():
    at = {"policy_chosen_logps": jnp.array([-2.0, -30.0]), "chosen_lengths": jnp.array([2, 10])}
    at["mean_chosen_length"] = jnp.mean(at["chosen_lengths"].astype(jnp.float32))
    np.testing.assert_allclose(apply(PAIR_LOSSES["sft"], at).mean(), 32 / 12, rtol=1e-6)
    np.testing.assert_allclose(apply(PAIR_LOSSES["sft_norm"], at).mean(), (1 + 3) / 2, rtol=1e-6)


def test_beta_grows_with_the_excess_of_the_batch_margin_and_stays_positive():
    at = {"chosen": 1.0, "rejected": 0.0}
    by_hand = np.log1p(np.exp(-0.1 * (1 + 0.6 * 0.1 * 5)))
    np.testing.assert_allclose(value("beta_dpo", **at, mean_margin=jnp.array(5.0)), by_hand, rtol=1e-6)
    lowest = value("beta_dpo", **at, mean_margin=jnp.array(-1e3))
    np.testing.assert_allclose(lowest, np.log1p(np.exp(-1e-3)), rtol=1e-6)


def test_a_wpo_weight_carries_no_gradient_and_is_one_under_a_uniform_policy():
    logps, lengths = jnp.array([-3 * np.log(5.0)], jnp.float32), jnp.array([3])
    np.testing.assert_allclose(wpo_weights(logps, lengths, logps), [1.0])
    np.testing.assert_allclose(wpo_weights(logps, lengths), [0.2], rtol=1e-6)
    assert jax.grad(lambda x: wpo_weights(x, lengths).sum())(logps)[0] == 0


def test_which_losses_need_a_reference():
    free = {name for name, loss in PAIR_LOSSES.items() if not needs_reference(loss)}
    assert free == {"sft", "sft_norm", "simpo", "orpo", "cpo", "slic"}
    assert needs_reference(functools.partial(dpo, beta=0.5))


def test_an_input_nobody_knows_is_named_with_the_way_out():
    def slic(policy_chosen_logp, policy_rejected_logps, delta=1.0):
        return delta

    with pytest.raises(
        ValueError, match=r"slic has an unknown input 'policy_chosen_logp' .did you mean 'policy_chosen_logps"
    ):
        check_inputs(slic, PAIR_INPUTS)
    with pytest.raises(ValueError, match=r"dpo requires ref_chosen_logps, ref_rejected_logps, but there is only"):
        apply(dpo, {"policy_chosen_logps": 0, "policy_rejected_logps": 0})


def test_a_mixture_has_the_inputs_of_all_its_terms():
    loss = select_loss("dpo(beta=0.5) + 0.2*sft", PAIR)
    assert set(input_names(loss)) == set(input_names(dpo)) | {"mean_chosen_length"}
    assert needs_reference(loss) and not needs_whole_batch(loss)
    np.testing.assert_allclose(value("dpo + 0.2*sft"), LOG2 + 0.4, rtol=1e-6)
    assert needs_whole_batch(mixture([(1.0, dpo), (0.1, PAIR_LOSSES["aot"])]))
    assert select_loss("dpo", PAIR) is dpo


def test_losses_run_under_jit_and_vmap():
    at = pair(1.0, -1.0)
    four = [at[name] for name in input_names(dpo)]
    stacked = jax.jit(jax.vmap(dpo))(*(jnp.stack([x, x]) for x in four))
    np.testing.assert_allclose(stacked[1], dpo(*four), rtol=1e-6)
