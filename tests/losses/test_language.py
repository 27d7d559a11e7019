import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.losses.language import cross_entropy, dft

LOGITS = jnp.array([2.0, 0.0, -1.0, 0.5])


def stats(logits, target=0):
    log_z = jax.nn.logsumexp(logits)
    return (logits[target] - log_z)[None], log_z[None], jnp.mean(logits)[None]


def test_plain_cross_entropy_is_minus_the_log_probability():
    np.testing.assert_allclose(cross_entropy(*stats(LOGITS)), -jax.nn.log_softmax(LOGITS)[:1], rtol=1e-6)


def test_smoothing_is_the_cross_entropy_with_the_smoothed_target():
    target = jnp.array([1.0, 0, 0, 0]) * 0.8 + 0.2 / 4
    expected = -jnp.sum(target * jax.nn.log_softmax(LOGITS))
    np.testing.assert_allclose(cross_entropy(*stats(LOGITS), label_smoothing=0.2), [expected], rtol=1e-6)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
def test_without_preference_the_loss_is_log_v_whatever_the_smoothing(label_smoothing):
    loss = cross_entropy(*stats(jnp.zeros(4)), label_smoothing=label_smoothing)
    np.testing.assert_allclose(loss, [np.log(4)], rtol=1e-6)


def test_z_loss_pulls_the_normaliser_to_one_without_moving_the_distribution():
    def shifted(c):
        return cross_entropy(*stats(LOGITS + c), z_loss=0.1)[0]

    log_z = float(jax.nn.logsumexp(LOGITS))
    np.testing.assert_allclose(jax.grad(shifted)(0.0), 2 * 0.1 * log_z, rtol=1e-5)
    np.testing.assert_allclose(jax.grad(shifted)(-log_z), 0.0, atol=1e-6)


def test_dft_weighs_the_gradient_of_cross_entropy_by_the_probability():
    logps = jnp.log(jnp.array([0.25, 0.5]))
    np.testing.assert_allclose(dft(logps), [0.25 * np.log(4), 0.5 * np.log(2)], rtol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda x: dft(x).sum())(logps), [-0.25, -0.5], rtol=1e-6)
