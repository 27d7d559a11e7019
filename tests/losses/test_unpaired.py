import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.losses import PAIR_LOSSES, UNPAIRED_LOSSES, apo_zero_unpaired, bco, kto
from jaxalign.losses.unpaired import balanced_lambdas

LABELS = jnp.array([True, False])
REF = jnp.array([-20.0, -20.0])
ZERO = jnp.zeros(())


def test_kto_is_half_its_weight_where_policy_and_reference_agree():
    np.testing.assert_allclose(kto(REF, REF, LABELS, ZERO, lambda_d=3.0, lambda_u=5.0), [1.5, 2.5])


def test_kto_by_hand_keeps_its_offset():
    gain = 0.5 * (2.0 - 1.0)
    expected = [2.0 - 2.0 / (1 + np.exp(-gain)), 1.0 - 1.0 / (1 + np.exp(gain))]
    losses = kto(REF + 2.0, REF, LABELS, jnp.array(1.0), beta=0.5, lambda_d=2.0)
    np.testing.assert_allclose(losses, expected, rtol=1e-6)


def test_a_negative_kl_estimate_counts_as_zero_and_the_estimate_has_no_gradient():
    np.testing.assert_array_equal(kto(REF + 1, REF, LABELS, jnp.array(-4.0)), kto(REF + 1, REF, LABELS, ZERO))
    assert jax.grad(lambda kl: kto(REF, REF, LABELS, kl).sum())(jnp.array(0.5)) == 0


def test_apo_zero_of_a_pair_is_the_sum_of_its_rows_less_one():
    policy = REF + jnp.array([1.5, -0.5])
    rows = apo_zero_unpaired(policy, REF, LABELS).sum()
    pair = PAIR_LOSSES["apo_zero"](policy[:1], policy[1:], REF[:1], REF[1:])
    np.testing.assert_allclose(rows - 1, pair[0], rtol=1e-5)


def test_bco_of_a_pair_is_bco_pair():
    policy = REF + jnp.array([1.5, -0.5])
    rows = bco(policy, REF, LABELS, jnp.array(1.5), jnp.array(-0.5)).sum()
    pair = PAIR_LOSSES["bco_pair"](policy[:1], policy[1:], REF[:1], REF[1:], jnp.array(0.5))
    np.testing.assert_allclose(rows, pair[0], rtol=1e-6)


@pytest.mark.parametrize("name", UNPAIRED_LOSSES)
@pytest.mark.parametrize("away", [0.3, 1e4, -1e4])
def test_losses_raise_desirable_and_lower_undesirable_responses_and_stay_finite(name, away):
    statistics = {"kto": [ZERO], "apo_zero_unpaired": [], "bco": [ZERO, ZERO]}[name]

    def loss(x):
        return UNPAIRED_LOSSES[name](x, REF, LABELS, *statistics).sum()

    total, slope = jax.value_and_grad(loss)(REF + away)
    assert np.isfinite(total) and np.isfinite(slope).all() and slope[0] <= 0 <= slope[1]
    if away == 0.3:
        assert slope[0] < 0 < slope[1]


def test_lambdas_bring_uneven_counts_into_the_papers_range():
    assert balanced_lambdas(100, 100) == (1.0, 1.0) and balanced_lambdas(120, 100) == (1.0, 1.0)
    assert balanced_lambdas(100, 400) == (4.0, 1.0) and balanced_lambdas(400, 100) == (1.0, 4.0)
    np.testing.assert_allclose(balanced_lambdas(1, 10, ratio=4 / 3)[0], 13.33, atol=0.01)
    with pytest.raises(ValueError, match="0 undesirable"):
        balanced_lambdas(3, 0)
    with pytest.raises(ValueError, match="outside"):
        balanced_lambdas(3, 1, ratio=2.0)
