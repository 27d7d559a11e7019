"""A train step of any algorithm: gradients, microbatches, minibatches, skipped steps, and what it counts."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign.algorithms.base import Algorithm
from jaxalign.training.state import TrainState
from jaxalign.training.step import count_tokens, cut, join, make_train_step
from jaxalign.types import Average, TokenBatch

ROWS, WIDTH = 8, 3


def squared_error(params, batch):
    error = (batch["x"] @ params["w"] - batch["y"]) ** 2
    return Average.of(error, batch["mask"]), {"bias": Average.of(batch["y"], batch["mask"])}


def regression(seed=0):
    x_key, y_key, mask_key = jax.random.split(jax.random.key(seed), 3)
    return {
        "x": jax.random.normal(x_key, (ROWS, 5, WIDTH)),
        "y": jax.random.normal(y_key, (ROWS, 5)),
        "mask": jax.random.bernoulli(mask_key, 0.4, (ROWS, 5)),
    }


def start(optimizer, dtype=jnp.float32):
    return TrainState.create({"w": jnp.ones(WIDTH, dtype)}, optimizer, jax.random.key(1))


def test_any_number_of_microbatches_gives_the_same_step_on_ragged_masks():
    optimizer, batch = optax.adam(0.1), regression()
    outcomes = []
    for microbatches in (1, 2, 4, 8):
        step = jax.jit(make_train_step(Algorithm(squared_error), optimizer, microbatches=microbatches))
        state = start(optimizer)
        for _ in range(5):
            state, metrics = step(state, None, batch)
        outcomes.append((state.params["w"], metrics["loss"], metrics["grad_norm"], metrics["bias"]))
    for other in outcomes[1:]:
        chex.assert_trees_all_close(other, outcomes[0], atol=1e-6)


def test_one_step_of_gradient_descent_is_the_gradient_of_the_masked_mean():
    x, y = np.array([[[1.0, 0, 0], [0, 1.0, 0]]]), np.array([[3.0, 9.0]])
    batch = {"x": jnp.array(x), "y": jnp.array(y), "mask": jnp.array([[True, False]])}
    state, metrics = make_train_step(Algorithm(squared_error), optax.sgd(0.25))(start(optax.sgd(0.25)), None, batch)
    # (1 - 3)^2 = 4 on the one token; d/dw_0 = 2 (1 - 3) = -4
    np.testing.assert_allclose(state.params["w"], [2.0, 1.0, 1.0])
    assert metrics["loss"] == 4.0 and metrics["grad_norm"] == 4.0 and metrics["skipped"] == 0.0
    assert state.step == 1


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_step_that_is_not_finite_changes_nothing_but_the_count(bad):
    optimizer, batch = optax.adam(0.1), regression()
    step = jax.jit(make_train_step(Algorithm(squared_error), optimizer))
    before, _ = step(start(optimizer), None, batch)
    after, metrics = step(before, None, batch | {"y": batch["y"].at[0].set(bad), "mask": batch["mask"].at[0].set(True)})
    assert metrics["skipped"] == 1.0
    chex.assert_trees_all_equal((after.params, after.opt_state), (before.params, before.opt_state))
    assert after.step == before.step + 1


def test_a_carry_sees_each_whole_batch_before_across_and_forgets_a_skipped_one():
    def remember(carry, batch):
        assert batch["x"].shape[0] == ROWS  # all microbatches
        carry = carry + jnp.sum(batch["y"])
        return carry, batch | {"so_far": jnp.full(ROWS, carry)}

    def across(batch):
        return batch | {"twice": 2 * batch["so_far"]}

    def loss(params, batch):
        return squared_error(params, batch)[0], {"twice": Average.of(batch["twice"])}

    optimizer, batch = optax.sgd(0.1), regression() | {"mask": jnp.ones((ROWS, 5), bool)}
    algorithm = Algorithm(loss, across=across, carry=np.float32(3), remember=remember)
    step = jax.jit(make_train_step(algorithm, optimizer, microbatches=2))
    state = TrainState.create({"w": jnp.ones(WIDTH)}, optimizer, jax.random.key(1), carry=algorithm.carry)
    total = float(batch["y"].sum())
    state, metrics = step(state, None, batch)
    assert float(state.carry) == pytest.approx(3 + total, rel=1e-6)
    assert metrics["twice"] == pytest.approx(2 * (3 + total), rel=1e-6)
    after, metrics = step(state, None, batch | {"y": batch["y"].at[0, 0].set(jnp.nan)})
    assert metrics["skipped"] == 1.0 and float(after.carry) == float(state.carry)


def test_a_batch_with_nothing_to_learn_changes_no_parameter():
    optimizer, batch = optax.sgd(0.1), regression()
    step = make_train_step(Algorithm(squared_error), optimizer)
    state, metrics = step(start(optimizer), None, batch | {"mask": jnp.zeros_like(batch["mask"])})
    np.testing.assert_array_equal(state.params["w"], jnp.ones(WIDTH))
    assert metrics["loss"] == 0.0


def test_prepare_sees_the_frozen_model_in_the_same_microbatches_and_rows_keep_their_places():
    def prepare(params, frozen, batch):
        assert batch["x"].shape[0] == ROWS // 4
        return batch | {"y": batch["y"] + frozen}

    optimizer, batch = optax.sgd(0.1), regression()
    seen = make_train_step(Algorithm(squared_error, prepare), optimizer, microbatches=4)
    same = make_train_step(Algorithm(squared_error), optimizer)
    one, _ = seen(start(optimizer), jnp.float32(2.0), batch)
    two, _ = same(start(optimizer), None, batch | {"y": batch["y"] + 2.0})
    chex.assert_trees_all_close(one.params, two.params, atol=1e-6)


def lay_over(params, frozen):
    return {"w": frozen["w"] + params["shift"]}


@pytest.mark.parametrize("options", [{}, {"epochs": 2, "minibatches": 2}], ids=str)
def test_assemble_lays_trained_leaves_over_frozen_ones_and_only_the_trained_change(options):
    # w = frozen + shift has the gradient of w, so training the shift from 0 is training w from the frozen value.
    optimizer, batch = optax.adam(0.1), regression()
    start_w = jnp.array([0.5, -1.0, 2.0])
    part = jax.jit(make_train_step(Algorithm(squared_error, assemble=lay_over, **options), optimizer, microbatches=2))
    whole = jax.jit(make_train_step(Algorithm(squared_error, **options), optimizer, microbatches=2))
    one = TrainState.create({"shift": jnp.zeros(WIDTH)}, optimizer, jax.random.key(1))
    two = TrainState.create({"w": start_w}, optimizer, jax.random.key(1))
    for _ in range(3):
        one, metrics = part(one, {"w": start_w}, batch)
        two, expected = whole(two, None, batch)
    assert list(one.params) == ["shift"]
    chex.assert_trees_all_close(start_w + one.params["shift"], two.params["w"], atol=1e-6)
    chex.assert_trees_all_close(metrics, expected, atol=1e-5)


def test_the_frozen_leaves_are_a_base_for_the_loss_and_a_reference_for_prepare():
    """Preference methods with adapters rely on it: at step 0 the policy is the reference, and then it moves."""

    def prepare(params, frozen, batch):
        return batch | {"reference": batch["x"] @ frozen["w"], "before": batch["x"] @ params["w"]}

    def loss(params, batch):
        moved = batch["x"] @ params["w"] - batch["reference"]
        same = batch["before"] - batch["reference"]
        return squared_error(params, batch)[0], {"moved": Average.of(moved**2), "before": Average.of(same**2)}

    optimizer, base = optax.sgd(0.1), {"w": jnp.array([0.5, -1.0, 2.0])}
    step = jax.jit(make_train_step(Algorithm(loss, prepare, assemble=lay_over), optimizer, microbatches=2))
    state = TrainState.create({"shift": jnp.zeros(WIDTH)}, optimizer, jax.random.key(1))
    state, first = step(state, base, regression())
    _, second = step(state, base, regression())
    assert first["moved"] == first["before"] == 0.0
    assert second["moved"] == second["before"] > 0.0


def test_epochs_and_minibatches_update_once_each_and_draw_rows_from_the_step_key():
    optimizer, batch = optax.sgd(0.05), regression()
    algorithm = Algorithm(squared_error, epochs=2, minibatches=4)
    step = jax.jit(make_train_step(algorithm, optimizer))
    one, metrics = step(start(optimizer), None, batch)
    two, _ = step(start(optimizer), None, batch)
    chex.assert_trees_all_equal(one.params, two.params)
    full, _ = make_train_step(Algorithm(squared_error), optimizer)(start(optimizer), None, batch)
    assert float(jnp.abs(one.params["w"] - full.params["w"]).max()) > 1e-3
    np.testing.assert_allclose(metrics["bias"], Average.of(batch["y"], batch["mask"]).compute(), rtol=1e-5)


def test_rows_that_fill_a_batch_up_do_not_change_which_rows_are_in_a_minibatch():
    """More devices need more of them; each minibatch gets its share, and the others are dealt as without."""
    optimizer, batch = optax.sgd(0.05), regression()
    filled = jax.tree.map(lambda x: jnp.concatenate([x, jnp.zeros((4, *x.shape[1:]), x.dtype)]), batch)
    expected, metrics = make_train_step(Algorithm(squared_error, epochs=2, minibatches=4), optimizer)(
        start(optimizer), None, batch
    )
    algorithm = Algorithm(squared_error, epochs=2, minibatches=4, rows=ROWS)
    for rows in (batch, filled):
        state, others = jax.jit(make_train_step(algorithm, optimizer, microbatches=1))(start(optimizer), None, rows)
        chex.assert_trees_all_close((state.params, others["loss"]), (expected.params, metrics["loss"]), atol=1e-6)


def test_the_update_that_halts_is_not_applied_and_those_behind_it_are_not_computed():
    """w = 1, 2, 2.5, ... with losses 4, 1, 0.25: the third halts."""
    batch = {"x": jnp.array([[[1.0, 0, 0]]]), "y": jnp.array([[3.0]]), "mask": jnp.array([[True]])}

    def halt(averages):
        return averages["loss"].compute() < 0.5

    algorithm = Algorithm(squared_error, epochs=5, halt=halt, at_first=("bias",))
    state, metrics = jax.jit(make_train_step(algorithm, optax.sgd(0.25)))(start(optax.sgd(0.25)), None, batch)
    np.testing.assert_allclose(state.params["w"], [2.5, 1.0, 1.0])
    assert metrics["updates"] == 2 and metrics["skipped"] == 0
    assert metrics["loss"] == pytest.approx((4 + 1 + 0.25) / 3) and metrics["first/bias"] == 3.0


def test_a_step_is_traced_once_and_optimizer_state_keeps_its_dtype_with_bfloat16_parameters():
    optimizer, batch = optax.adam(0.1), regression()
    step = jax.jit(chex.assert_max_traces(make_train_step(Algorithm(squared_error), optimizer), n=1))
    state = start(optimizer, jnp.bfloat16)
    dtypes = jax.tree.map(lambda x: x.dtype, state)
    for _ in range(3):
        state, _ = step(state, None, batch)
    assert jax.tree.map(lambda x: x.dtype, state) == dtypes
    assert state.params["w"].dtype == jnp.bfloat16


def test_cut_takes_every_kth_row_and_join_puts_them_back():
    rows = jnp.arange(12).reshape(6, 2)
    np.testing.assert_array_equal(cut(rows, 3)[1], rows[1::3])
    np.testing.assert_array_equal(join(cut(rows, 3)), rows)


def test_a_batch_that_cannot_be_cut_says_which_size_could():
    with pytest.raises(
        ValueError, match="`batch_size` 7 cannot be cut into 2 equal parts; the largest batch that can is 6"
    ):
        cut(jnp.zeros((7, 1)), 2)


def test_tokens_are_counted_without_padding_in_every_part_of_a_batch():
    ids = np.array([[1, 1, 2, 0], [0, 0, 1, 1]])
    part = TokenBatch(tokens=ids, mask=ids > 0, positions=ids, segment_ids=ids)
    assert count_tokens({"chosen": part, "rejected": part, "x": ids}) == 10


def test_a_nan_in_the_log_probability_kernel_skips_the_step():
    from jaxalign.ops.logprobs import token_logps
    from jaxalign.types import Unembedding

    def loss(params, batch):
        values = token_logps(batch["x"], Unembedding(params["w"]), batch["y"], implementation="pallas")
        return Average.of(-values.logps), {}

    optimizer = optax.adam(0.1)
    params = {"w": jnp.ones((20, WIDTH))}
    step = jax.jit(make_train_step(Algorithm(loss), optimizer))
    batch = {"x": jnp.ones((ROWS, WIDTH)), "y": jnp.arange(ROWS)}
    state, metrics = step(TrainState.create(params, optimizer, jax.random.key(0)), None, batch)
    assert metrics["skipped"] == 0.0
    np.testing.assert_allclose(metrics["loss"], np.log(20), rtol=1e-6)
    after, metrics = step(state, None, {**batch, "x": batch["x"].at[1, 0].set(jnp.nan)})
    assert metrics["skipped"] == 1.0 and np.isnan(metrics["loss"])
    chex.assert_trees_all_equal(after.params, state.params)
