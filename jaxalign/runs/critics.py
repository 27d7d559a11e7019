"""The critic of a PPO run: which model it starts from, what of it is trained, and its first parameters."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.config.on_policy import PPOConfig
from jaxalign.mistake import Mistake
from jaxalign.models import heads
from jaxalign.models.adapters.lora import join, split
from jaxalign.models.files import huggingface
from jaxalign.models.files.load import load_params
from jaxalign.models.files.reward import CLASSIFIERS, RewardModel, load_reward_params, read_reward_model
from jaxalign.runs import adapters, train
from jaxalign.runs.program import Critic, decoder
from jaxalign.types import PyTree

log = logging.getLogger(__name__)


class Plan(NamedTuple):
    """The critic, and the structure of its trunk (None where it has none of its own)."""

    critic: Critic
    graphdef: Any


def plan(config: PPOConfig, base: train.Base, reward_folders: list[str]) -> Plan:
    """What the critic is, by --critic and --lora; no array is made.

    A trunk of its own starts from the reward model, head and all: the first values are the scores of unfinished
    responses. Else the head is 0, and so are the first values. With --lora.rank the critic is a head and adapters on
    the base of the policy's.

    Args:
      reward_folders: the reward models of --reward.

    Raises:
      Mistake: --critic.model and what excludes it, or a model that reads other tokens than the policy.
    """
    if config.critic.model and (config.critic.shared or base.lora is not None):
        other = "`critic.shared`" if config.critic.shared else f"`lora.rank` {config.lora.rank}"
        raise Mistake(f"`critic.model` {config.critic.model} is a model of its own; leave out {other}, or it")
    if config.critic.shared:
        return Plan(_critic(config, _head_like(base.model.hidden_size), new=_zeros), None)
    if base.lora is not None:
        return _adapted(config, base)
    source = config.critic.model or _first_fitting(base, reward_folders) or config.model
    if huggingface.read_hf_config(source).get("architectures", ["?"])[0] in CLASSIFIERS:
        return _from_reward_model(config, base, source)
    return _from_language_model(config, base, source)


def _critic(config: PPOConfig, like: PyTree, *, new: Any, assemble: Any = None, own_trunk: bool = False) -> Critic:
    return Critic(like, assemble or (lambda params, frozen: params), new, own_trunk, config.critic.learning_rate)


def _head_like(width: int) -> PyTree:
    return {"head": jax.ShapeDtypeStruct((1, width), jnp.float32), "bias": jax.ShapeDtypeStruct((1,), jnp.float32)}


def _zeros(like: PyTree, key: jax.Array, frozen: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding), like)


def _adapted(config: PPOConfig, base: train.Base) -> Plan:
    """Adapters and a head on the frozen base."""
    graphdef, abstract = decoder(config, base.model, base.mesh, base.lora)
    like = _head_like(base.model.hidden_size) | {"model": split(abstract)[1]}

    def assemble(params: PyTree, frozen: PyTree) -> PyTree:
        return params | {"model": join(params["model"], frozen)}

    def new(like: PyTree, key: jax.Array, frozen: PyTree) -> PyTree:
        head = _zeros({name: like[name] for name in ("head", "bias")}, key, frozen)
        return head | {"model": adapters.new_adapter(like["model"], key, frozen)}

    return Plan(_critic(config, like, new=new, assemble=assemble, own_trunk=True), graphdef)


def _from_language_model(config: PPOConfig, base: train.Base, source: str) -> Plan:
    model = heads.trunk_config(huggingface.read_config(source))
    _check_vocabulary(base, source)
    graphdef, abstract = decoder(config, model, base.mesh, None)

    def new(like: PyTree, key: jax.Array, frozen: PyTree) -> PyTree:
        places = jax.tree.map(lambda x: x.sharding, like["model"])
        head = _zeros({name: like[name] for name in ("head", "bias")}, key, frozen)
        return head | {"model": load_params(source, model, param_dtype=config.param_dtype, shardings=places)}

    log.info("the critic starts from %s, its values from 0", source)
    return Plan(_critic(config, _head_like(model.hidden_size) | {"model": abstract}, new=new, own_trunk=True), graphdef)


def _from_reward_model(config: PPOConfig, base: train.Base, source: str) -> Plan:
    model = _read(source)
    _check_vocabulary(base, source)
    graphdef, abstract = decoder(config, model.config, base.mesh, None)

    def new(like: PyTree, key: jax.Array, frozen: PyTree) -> PyTree:
        """The mean over members of (r - mean) / std is linear in the hidden state: one head and one bias."""
        places = jax.tree.map(lambda x: x.sharding, like)
        small = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        wanted = jax.tree.map(lambda _: small, model.like) | {"model": places["model"]}
        params = load_reward_params(model, shardings=wanted)
        head = jnp.mean(params["head"] / params["std"][:, None], axis=0, keepdims=True)
        bias = -jnp.mean(params["mean"] / params["std"], keepdims=True)
        made = {"head": head, "bias": bias, "model": params["model"]}
        return jax.tree.map(lambda x, to: jax.device_put(x.astype(to.dtype), to.sharding), made, like)

    log.info("the critic starts from the reward model %s", source)
    like = _head_like(model.config.hidden_size) | {"model": abstract}
    return Plan(_critic(config, like, new=new, own_trunk=True), graphdef)


def _read(source: str) -> RewardModel:
    model = read_reward_model(source)
    if model.base:
        raise Mistake(
            f"the reward model {source} is adapters on {model.base}, which no critic starts from; give `critic.model`"
        )
    return model


def _first_fitting(base: train.Base, folders: list[str]) -> str | None:
    """The first reward model that a critic can start from: one that reads the policy's tokens."""
    for folder in folders:
        try:
            _read(folder)
            _check_vocabulary(base, folder)
        except ValueError as error:
            log.info("%s; the critic does not start from it", error)
        else:
            return folder
    return None


def _check_vocabulary(base: train.Base, source: str) -> None:
    theirs = huggingface.load_tokenizer(source)
    if theirs.get_vocab() != base.vocabulary.tokenizer.get_vocab():
        raise Mistake(f"{source} has another tokenizer than the policy, so it reads other tokens")
