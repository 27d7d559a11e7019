import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.training.optimizer import adamw, is_matrix, learning_rate_schedule


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("constant", [1, 2, 3, 3, 3, 3]),
        ("linear", [1, 2, 3, 2.25, 1.5, 0.75]),
        ("cosine", [1, 2, 3, 2.5607, 1.5, 0.4393]),
    ],
)
def test_the_rate_rises_over_warmup_and_then_follows_its_schedule(schedule, expected):
    rate = learning_rate_schedule(3.0, schedule=schedule, steps=6, warmup_steps=2)
    np.testing.assert_allclose([rate(n) for n in range(6)], expected, atol=1e-4)


def test_without_warmup_the_first_step_has_the_peak_rate_and_the_end_is_zero():
    rate = learning_rate_schedule(3.0, schedule="linear", steps=4)
    np.testing.assert_allclose([rate(0), rate(4)], [3.0, 0.0])


def test_warmup_longer_than_the_run_is_an_error():
    with pytest.raises(ValueError, match="warmup_steps=10 leaves nothing of steps=10"):
        learning_rate_schedule(1.0, steps=10, warmup_steps=10)


def test_decay_is_for_matrices_only_and_the_layer_axis_does_not_count():
    params = {
        "embedding": jnp.ones((4, 2)),
        "norm": {"scale": jnp.ones(2)},
        "blocks": {"up": {"kernel": jnp.ones((3, 2, 2)), "bias": jnp.ones((3, 2))}},
    }
    expected = {
        "embedding": True,
        "norm": {"scale": False},
        "blocks": {"up": {"kernel": True, "bias": False}},
    }
    assert is_matrix(params) == expected


def test_one_update_by_hand():
    # |g| = 5 is clipped to 1: g = (0.6, 0.8). Adam's first update is -lr * sign(g); decay takes lr * 0.1 * w.
    optimizer = adamw(learning_rate_schedule(0.5, schedule="constant", steps=1), weight_decay=0.1, max_grad_norm=1.0)
    params = {"kernel": jnp.array([[2.0, 2.0]])}
    updates, _ = optimizer.update({"kernel": jnp.array([[3.0, 4.0]])}, optimizer.init(params), params)
    # 1 - 0.999 in float32 is off by 1.3e-5 of itself, and the bias correction inherits half of that.
    np.testing.assert_allclose(updates["kernel"], [[-0.5 - 0.1, -0.5 - 0.1]], rtol=1e-5)
