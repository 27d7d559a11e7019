"""What a run compiles: the train step of a config and a method, on a mesh whose devices need not be there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jaxalign.algorithms.base import Algorithm, AssembleFn, FollowFn
from jaxalign.config.shared import TrainConfig
from jaxalign.models.adapters.lora import Lora, join
from jaxalign.models.decoder.config import ModelConfig
from jaxalign.models.decoder.decoder import make_decoder
from jaxalign.models.places import Layout
from jaxalign.runs import adapters, devices, members
from jaxalign.training import optimizer, sharding
from jaxalign.training.state import TrainState
from jaxalign.training.step import make_train_step
from jaxalign.types import PyTree


class Critic(NamedTuple):
    """What is trained beside a policy: the params are {"policy": ..., "critic": ...}."""

    like: PyTree  # ShapeDtypeStructs of its trained leaves
    assemble: AssembleFn  # (its trained leaves, frozen) -> what the algorithm sees
    new: Callable[[PyTree, jax.Array, PyTree], PyTree]  # (like, with shardings; key; frozen) -> its first leaves
    own_trunk: bool  # its forward and backward pass are as the policy's
    learning_rate: float | None = None  # its peak; None: the policy's


class Method(NamedTuple):
    """What differs from command to command: the algorithm, and the trees that it is about."""

    build: Callable[[Any, Any], Algorithm]  # (graphdef of what is trained, graphdef of the frozen model)
    reference: bool = False  # a model that is not trained runs in `prepare`
    offload: bool = False  # it lies in the hosts' memory, and is on the devices while `prepare` runs
    follow: FollowFn | None = None  # how it follows the policy; None: it is frozen
    epochs: int = 1  # passes over a batch
    updates: int = 1  # of the optimizer in a step
    critic: Critic | None = None
    heads: int = 0  # members of a scalar head on the model: runs/members.py
    freeze_trunk: bool = False  # the heads alone are trained


class Program(NamedTuple):
    """What is compiled, and the shapes and places of what it is compiled for."""

    graphdef: Any
    algorithm: Algorithm
    adamw: Any
    rate: Callable
    like: TrainState  # ShapeDtypeStructs with shardings
    frozen: Any  # the same of what is never trained; None when there is no such thing
    step: Any  # the jitted train step


def make_program(config: TrainConfig, model: ModelConfig, mesh: Mesh, method: Method, *, steps: int) -> Program:
    """The train step of a config; no array is made.

    With LoRA the frozen tree is the base, which is the reference as well; without, it is a second model, if the method
    wants one. A reference that follows the policy is a part of the state instead.
    """
    lora = adapters.lora_of(config.lora, model)
    graphdef, abstract = decoder(config, model, mesh, lora)
    frozen_graphdef, whole = (graphdef, abstract) if lora is None else decoder(config, model, mesh, None)
    trained, base = adapters.divide(abstract, lora)
    frozen = base if lora is not None else whole if method.reference and method.follow is None else None
    reference = () if method.follow is None else whole
    algorithm = method.build(graphdef, frozen_graphdef)._replace(follow=method.follow)
    if method.heads:
        trained, frozen = members.divide(abstract, lora, method.heads, freeze_trunk=method.freeze_trunk)
    elif lora is not None:
        algorithm = algorithm._replace(assemble=join)
    rate = learning_rate(config, steps * method.updates)
    adamw = _optimizer(config, rate)
    if method.critic is not None:
        trained, algorithm = _beside_policy(method.critic, trained, algorithm)
        adamw = _optimizers(config, rate, method.critic)
    key = jax.eval_shape(lambda: jax.random.key(0))
    create = lambda p, k, r: TrainState.create(p, adamw, k, carry=algorithm.carry, reference=r)  # noqa: E731
    like = jax.eval_shape(create, trained, key, reference)
    like, frozen = sharding.placed(like, mesh), sharding.placed(frozen, mesh, offload=method.offload)
    train_step = make_train_step(algorithm, adamw, microbatches=config.microbatches)
    step = sharding.jit_step(train_step, like, frozen, mesh, offload=method.offload)
    return Program(graphdef, algorithm, adamw, rate, like, frozen, step)


def decoder(config: TrainConfig, model: ModelConfig, mesh: Mesh, lora: Lora | None) -> tuple[Any, PyTree]:
    """(graphdef, ShapeDtypeStructs) of a model as a run computes it."""
    return make_decoder(
        model,
        compute_dtype=devices.compute_dtype(config.precision),
        param_dtype=config.param_dtype,
        remat=config.remat,
        attention=None if config.attention == "auto" else config.attention,
        layout=Layout(mesh) if mesh.size > 1 else None,
        lora=lora,
        quantise=config.lora.quantise,
    )


def _beside_policy(critic: Critic, policy: PyTree, algorithm: Algorithm) -> tuple[PyTree, Algorithm]:
    """(what is trained, the algorithm) of both; a reference follows the policy alone."""

    def assemble(params: PyTree, frozen: PyTree) -> PyTree:
        whole = algorithm.assemble(params["policy"], frozen)
        return {"policy": whole, "critic": critic.assemble(params["critic"], frozen)}

    follow = algorithm.follow
    if follow is not None:
        algorithm = algorithm._replace(follow=lambda ref, params, step: follow(ref, params["policy"], step))
    return {"policy": policy, "critic": critic.like}, algorithm._replace(assemble=assemble)


def implementation(config: TrainConfig) -> str | None:
    """Of log-probabilities, as `ops` take it."""
    return None if config.implementation == "auto" else config.implementation


def learning_rate(config: TrainConfig, steps: int) -> Callable:
    """The schedule of a config. Raises Mistake when it cannot be."""
    return optimizer.learning_rate_schedule(
        config.optimizer.learning_rate,
        schedule=config.optimizer.schedule,
        steps=steps,
        warmup_steps=config.optimizer.warmup_steps,
    )


def _optimizer(config: TrainConfig, rate: Any) -> Any:
    return optimizer.adamw(
        rate,
        weight_decay=config.optimizer.weight_decay,
        max_grad_norm=config.optimizer.max_grad_norm,
        b1=config.optimizer.b1,
        b2=config.optimizer.b2,
        accumulator_dtype=config.optimizer.accumulator_dtype,
    )


def _optimizers(config: TrainConfig, rate: Any, critic: Critic) -> Any:
    """One for the policy and one for the critic, each with its own rate, moments and clipping."""
    peak, own = config.optimizer.learning_rate, critic.learning_rate
    critic_rate = rate if own is None else lambda update: rate(update) * (own / peak)
    return optimizer.partition({"policy": _optimizer(config, rate), "critic": _optimizer(config, critic_rate)})
