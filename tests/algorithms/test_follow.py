"""A reference that follows the policy: when it moves, how far, and that a mesh changes nothing."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign.algorithms.follow import follow
from jaxalign.algorithms.pairwise import pairwise
from jaxalign.data.batches.groups import BatchShapes
from jaxalign.data.batches.plan import Plan
from jaxalign.losses import dpo
from jaxalign.models import places
from jaxalign.training import sharding
from jaxalign.training.state import TrainState
from jaxalign.training.step import make_train_step


def test_the_reference_stays_between_updates_and_moves_by_alpha_at_each():
    move = follow(alpha=0.25, every=3)
    reference, policy = {"w": jnp.array([4.0], jnp.bfloat16)}, {"w": jnp.array([8.0])}
    assert [float(move(reference, policy, jnp.int32(step))["w"][0]) for step in (1, 2, 3, 4, 6)] == [4, 4, 5, 4, 5]
    assert move(reference, policy, jnp.int32(3))["w"].dtype == jnp.bfloat16


@pytest.mark.parametrize(("alpha", "every"), [(0.0, 1), (1.5, 1), (0.5, 0)])
def test_an_update_that_cannot_be_is_refused(alpha, every):
    with pytest.raises(ValueError, match="must be"):
        follow(alpha=alpha, every=every)


def trained(tiny, pairs, moves, *, mesh_sizes=None, steps=4):
    graphdef, policy, _ = tiny
    algorithm = pairwise(graphdef, graphdef, loss=dpo)._replace(follow=moves)
    optimizer = optax.adamw(1e-3)
    step = make_train_step(algorithm, optimizer)
    batch = jax.tree.map(jnp.asarray, BatchShapes.of(pairs, Plan(16, 20, unit=16)).batch(pairs))
    copies = [jax.tree.map(jnp.copy, policy) for _ in range(2)]  # the step donates both
    state = TrainState.create(copies[0], optimizer, jax.random.key(0), reference=copies[1])
    if mesh_sizes is None:
        step = jax.jit(step)
    else:
        mesh = places.make_mesh(**mesh_sizes)
        step = sharding.jit_step(step, state, None, mesh)
        state = jax.device_put(state, places.shardings(state, mesh))
        batch = sharding.put_batch(jax.device_get(batch), mesh)
    losses = []
    for _ in range(steps):
        state, metrics = step(state, None, batch)
        losses.append(float(metrics["loss"]))
    return jax.device_get((state.params, state.reference)), losses


def test_a_copy_every_two_steps_starts_the_loss_again_from_log_two(tiny, pairs):
    (params, reference), losses = trained(tiny, pairs, follow(alpha=1.0, every=2))
    assert losses[::2] == pytest.approx([np.log(2)] * 2, abs=1e-5)
    assert max(losses[1::2]) < np.log(2) - 1e-3
    chex.assert_trees_all_equal(params, reference)


def test_a_reference_cut_by_a_mesh_follows_as_a_whole_one_does(tiny, pairs):
    expected, losses = trained(tiny, pairs, follow(alpha=0.5, every=2), steps=3)
    result, others = trained(
        tiny, pairs, follow(alpha=0.5, every=2), steps=3, mesh_sizes={"data": 2, "fsdp": 2, "tensor": 2}
    )
    chex.assert_trees_all_close(result, expected, atol=1e-5)
    assert others == pytest.approx(losses, abs=1e-5)
