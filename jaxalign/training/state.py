"""State that training changes. Other trees (a frozen reference, a reward model) are never donated or checkpointed."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax

from jaxalign.types import PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    step: jax.Array  # Int32[], number of train-step calls, skipped ones included: step n always reads batch n
    params: PyTree
    opt_state: optax.OptState
    key: jax.Array  # typed PRNG key; a step uses fold_in(key, step)
    carry: PyTree = ()  # scalars that the algorithm remembers; without leaves if there are none
    reference: PyTree = ()  # params of a reference that follows the policy; without leaves if it is frozen

    @classmethod
    def create(
        cls,
        params: PyTree,
        optimizer: optax.GradientTransformation,
        key: jax.Array,
        *,
        carry: PyTree = (),
        reference: PyTree = (),
    ) -> TrainState:
        """Step 0, with the optimizer's accumulators in float32 (or their own dtype) whatever the parameters are."""
        wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
        carry = jax.tree.map(jnp.asarray, carry)
        return cls(jnp.zeros((), jnp.int32), params, optimizer.init(wide), key, carry, reference)
