"""The compiled train step of a recipe, on a mesh whose devices need not be there."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh

from jaxalign.algorithms.base import Algorithm
from jaxalign.config.shared import TrainConfig
from jaxalign.models.decoder.decoder import compute_dtype
from jaxalign.models.decoder.layers import CAST
from jaxalign.models.files.huggingface import is_random
from jaxalign.models.files.weights import stored_dtype
from jaxalign.models.places import offloaded, placed
from jaxalign.training import optimizer, sharding
from jaxalign.training.part import Part
from jaxalign.training.state import TrainState
from jaxalign.training.step import make_train_step
from jaxalign.types import PyTree, leaf_names


class Recipe(NamedTuple):
    """The parameters that a command trains and the algorithm: shapes only, so it can be compiled anywhere."""

    part: Part
    algorithm: Algorithm
    reference: Part | None = None  # a model that `prepare` reads; with adapters it is their base
    critic_learning_rate: float | None = None  # peak, where "policy" and "critic" have optimizers of their own
    critic_forwards: int = 0  # passes of a critic's own trunk over each batch without gradient
    offload: bool = False  # the reference lies in the hosts' memory, and is on the devices while `prepare` runs

    @property
    def updates(self) -> int:
        """Optimizer updates in a step."""
        return self.algorithm.epochs * self.algorithm.minibatches

    @property
    def flops(self) -> float:
        """Operations of a step, in forward and backward passes of the model over its tokens; a forward is a third."""
        return self.part.flops * self.algorithm.epochs + ((self.reference is not None) + self.critic_forwards) / 3


class Program(NamedTuple):
    """A compiled step, and the shapes and places of its arguments."""

    recipe: Recipe
    algorithm: Algorithm  # the recipe's, with the `assemble` of its part
    optimizer: Any
    schedule: optax.Schedule  # learning rate of update n
    like: TrainState  # ShapeDtypeStructs with shardings
    frozen: PyTree | None  # the same of what is never trained; None where there is no such thing
    step: Any  # the jitted train step


def compile_step(
    config: TrainConfig, recipe: Recipe, mesh: Mesh, *, steps: int, earlier: Sequence[int] = ()
) -> Program:
    """The train step of a recipe, not yet lowered; no array is made. The schedule begins anew after `earlier` steps.

    The step's frozen argument is what lies under the trained leaves; where nothing does, the reference, unless it
    follows the policy and is a part of the state.
    """
    algorithm = recipe.algorithm._replace(assemble=recipe.part.assemble)
    peak, own = config.peak_learning_rate, recipe.critic_learning_rate
    schedule = learning_rate(config, steps, earlier, updates=recipe.updates)
    if own is None:
        critic_schedule = schedule
    elif peak == 0:  # the critic alone learns
        critic_schedule = learning_rate(config, steps, earlier, updates=recipe.updates, peak=own)
    else:

        def critic_schedule(update: jax.Array) -> jax.Array:
            return schedule(update) * (own / peak)

    adamw = _optimizer(config, recipe, policy=schedule, critic=critic_schedule)
    like, frozen = abstract_state(config, recipe, mesh, adamw)
    train_step = make_train_step(algorithm, adamw, microbatches=config.microbatches)
    step = sharding.jit_step(train_step, like, frozen, mesh, offload=recipe.offload)
    return Program(recipe, algorithm, adamw, schedule, like, frozen, step)


def abstract_state(
    config: TrainConfig, recipe: Recipe, mesh: Mesh, adamw: Any = None
) -> tuple[TrainState, PyTree | None]:
    """(the train state, the frozen leaves) as ShapeDtypeStructs with their places, by default with AdamW's state."""
    if adamw is None:
        adamw = _optimizer(config, recipe, policy=optax.constant_schedule(0.0), critic=optax.constant_schedule(0.0))
    part, reference, algorithm = recipe.part, recipe.reference, recipe.algorithm
    moving = reference.frozen if reference is not None and algorithm.follow is not None else ()
    frozen = part.frozen
    if frozen is None and reference is not None and algorithm.follow is None:
        frozen = reference.frozen
    key = jax.eval_shape(lambda: jax.random.key(0))

    def create(params: PyTree, key: jax.Array, reference: PyTree) -> TrainState:
        return TrainState.create(params, adamw, key, carry=algorithm.carry, reference=reference)

    like = placed(jax.eval_shape(create, part.trained, key, moving), mesh)
    return like, placed(as_computed(config, frozen), mesh, offload=recipe.offload)


def as_computed(config: TrainConfig, frozen: PyTree) -> PyTree:
    """Shapes of frozen leaves, kernels and embeddings in the dtype of computation if that is narrower.

    Products and lookups read nothing else, to the bit. DoRA takes the norms of its kernels as they are stored.
    """
    dtype = compute_dtype(config.precision)

    def computed(name: str, x: Any) -> Any:
        casts = re.search(CAST, name) and x.dtype.itemsize > dtype.itemsize and not config.lora.dora
        return jax.ShapeDtypeStruct(x.shape, dtype) if casts else x

    return jax.tree.map(computed, leaf_names(frozen), frozen)


def frozen_of_files(config: TrainConfig, program: Program, frozen: PyTree | None, mesh: Mesh) -> PyTree | None:
    """The frozen leaves under the trained ones as the model's files have them, for a model that is saved.

    Those of a run are cast to the dtype of computation, which loses nothing of files that have this dtype.
    """
    part, dtype = program.recipe.part, compute_dtype(config.precision).name
    if part.frozen is None or [x.dtype for x in jax.tree.leaves(part.frozen)] == [
        x.dtype for x in jax.tree.leaves(program.frozen)
    ]:
        return frozen
    if not is_random(config.model) and stored_dtype(config.model) == dtype:
        return frozen
    return part.load(placed(part.frozen, mesh))


def load_frozen(program: Program) -> PyTree | None:
    """The frozen leaves: in no checkpoint of the run, so read at every start."""
    recipe = program.recipe
    if program.frozen is None:
        return None
    if recipe.part.frozen is not None:
        return recipe.part.load(program.frozen)
    assert recipe.reference is not None
    leaves = _load_on_devices(recipe.reference, program.frozen)
    return offloaded(leaves) if recipe.offload else leaves


def new_state(config: TrainConfig, program: Program, frozen: PyTree | None) -> TrainState:
    """Step 0: the first parameters, the optimizer's accumulators, and a copy of the reference if it will move."""
    recipe, like = program.recipe, program.like
    params_key, state_key = jax.random.split(jax.random.key(config.seed))
    params = recipe.part.init(params_key, like.params, frozen)
    reference: PyTree = ()
    if program.algorithm.follow is not None:
        assert recipe.reference is not None
        reference = _load_on_devices(recipe.reference, like.reference)

    def create(params: PyTree, key: jax.Array, reference: PyTree) -> TrainState:
        return TrainState.create(params, program.optimizer, key, carry=program.algorithm.carry, reference=reference)

    places = jax.tree.map(lambda x: x.sharding, like)
    return jax.jit(create, out_shardings=places, donate_argnums=(0, 2))(params, state_key, reference)


def learning_rate(
    config: TrainConfig, steps: int, earlier: Sequence[int] = (), *, updates: int = 1, peak: float | None = None
) -> optax.Schedule:
    """The schedule of a config over its optimizer updates, `updates` a step. Raises Mistake when it cannot be."""
    rate = config.peak_learning_rate if peak is None else peak
    settings = dataclasses.replace(config.optimizer, learning_rate=rate)
    return optimizer.learning_rate_schedule(
        settings, steps=steps * updates, earlier=[step * updates for step in earlier]
    )


def implementation(config: Any) -> str | None:
    """The implementation of log-probabilities, as `ops` take it; None picks one."""
    return None if config.implementation == "auto" else config.implementation


def _load_on_devices(reference: Part, like: PyTree) -> PyTree:
    """Read on the devices, wherever it then lies: nothing else is there yet."""
    on_device = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding.with_memory_kind("device")), like
    )
    return reference.load(on_device)


def _optimizer(config: TrainConfig, recipe: Recipe, **rates: optax.Schedule) -> Any:
    """AdamW; where a critic is beside the policy, one for each, with its own rate, moments and clipping."""
    if not isinstance(recipe.part.trained, dict) or set(recipe.part.trained) != {"policy", "critic"}:
        return optimizer.adamw(config.optimizer, rates["policy"])
    return optimizer.partition({name: optimizer.adamw(config.optimizer, rate) for name, rate in rates.items()})
