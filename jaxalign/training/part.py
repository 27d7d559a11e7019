"""The trained model as one value: a `Part` is a tree of parameters, its leaves with gradients, and their first values.

    policy = language_model(config, model, mesh)     # all parameters, or adapters on a frozen base
    reference = frozen_copy(config, model, mesh, policy)
    both = beside(policy, critic)                    # {"policy": ..., "critic": ...}

Every constructor needs shapes only, so a plan, a benchmark or a compilation for an absent chip can use it. One law
holds for all: `assemble(init(key, like, frozen), load(like))` is the tree that is saved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxalign.config.offline import RewardConfig
from jaxalign.config.on_policy import PPOConfig
from jaxalign.config.shared import LoraConfig, TrainConfig
from jaxalign.mistake import Mistake
from jaxalign.models import heads
from jaxalign.models.adapters.lora import Lora, init_adapter, join, resolve_targets, split
from jaxalign.models.adapters.quantise import quantise_kernels
from jaxalign.models.decoder.config import ModelConfig
from jaxalign.models.decoder.decoder import decoder_for, init_params
from jaxalign.models.files import huggingface
from jaxalign.models.files.load import load_params
from jaxalign.models.files.peft import check_exportable
from jaxalign.models.files.reward import (
    SCORE,
    RewardModel,
    heads_of,
    is_classifier,
    load_reward_params,
    read_reward_model,
)
from jaxalign.types import PyTree

ADAPTERS, HEADS, CRITIC = 1, 2, 3  # folded into a run's key, for what starts at random beside the model


class Part(NamedTuple):
    """Parameters of a run: the leaves with gradients, the frozen ones under them, and how both are made and joined."""

    graphdef: nnx.GraphDef  # structure of the model that reads the assembled parameters
    trained: PyTree  # ShapeDtypeStructs of the leaves that have gradients
    frozen: PyTree | None  # the same of the leaves under them; in no checkpoint of the run
    init: Callable[[jax.Array, PyTree, PyTree], PyTree]  # (key, `trained` with shardings, frozen) -> trained leaves
    load: Callable[[PyTree], PyTree]  # `frozen` with shardings -> frozen leaves
    assemble: Callable[[PyTree, PyTree], PyTree]  # (trained, frozen) -> whole parameters
    flops: float = 1.0  # of a forward and backward pass, as a share of training all parameters


def lora_of(config: LoraConfig, model: ModelConfig) -> Lora | None:
    """The adapters that a config asks for; None where its rank is 0.

    Raises:
      Mistake: a target that the model does not have, or adapters that cannot be exported.
    """
    if config.rank == 0:
        return None
    lora = Lora(config.rank, config.alpha, resolve_targets(config.targets, model), config.rslora, config.dora)
    check_exportable(lora, model)
    return lora


def language_model(config: TrainConfig, model: ModelConfig, mesh: Mesh) -> Part:
    """The whole model of `model`; with `lora.rank` adapters on it as a frozen base."""
    lora = lora_of(config.lora, model)
    graphdef, abstract = decoder_for(config, model, mesh, lora)
    if lora is None:
        return Part(graphdef, abstract, None, _model_loader(config, model), _nothing, _trained_alone)
    base, adapter = split(abstract)

    def init(key: jax.Array, like: PyTree, base: PyTree) -> PyTree:
        return _new_adapter(jax.random.fold_in(key, ADAPTERS), like, base)

    # a third of the operations is the gradient of kernels, which a frozen base does not have
    return Part(graphdef, adapter, base, init, _base_loader(config, model), join, flops=2 / 3)


def scorer(config: RewardConfig, model: ModelConfig, mesh: Mesh) -> Part:
    """Scalar heads [M D] and the trunk they read; heads on a frozen trunk; or heads and adapters [M ...] on one base.

    The whole parameters are those of models/heads.py. Heads start at random, or as those of a classifier.
    """
    lora, count, model = lora_of(config.lora, model), config.members, heads.trunk_config(model)
    graphdef, abstract = decoder_for(config, model, mesh, lora)
    first_heads = heads_of(config.model, count, alike=lora is not None)
    shape = (count, model.hidden_size) if first_heads is None else first_heads.shape
    head = {"head": jax.ShapeDtypeStruct(shape, jnp.float32)}
    base_loader = _base_loader(config, model, besides=SCORE)

    def load(like: PyTree) -> PyTree:
        return {"model": base_loader(like["model"])}

    def new_heads(key: jax.Array, like: PyTree, frozen: PyTree) -> PyTree:
        if first_heads is not None:
            return {"head": jax.device_put(first_heads, like["head"].sharding)}
        make = jax.jit(heads.init_head, static_argnums=(1, 2), out_shardings=like["head"].sharding)
        return {"head": make(jax.random.fold_in(key, HEADS), *like["head"].shape)}

    def new_members(key: jax.Array, like: PyTree, frozen: PyTree) -> PyTree:
        adapters = _new_members(jax.random.fold_in(key, ADAPTERS), like["members"], frozen["model"])
        return new_heads(key, like, frozen) | {"members": adapters}

    def new_model(key: jax.Array, like: PyTree, frozen: PyTree) -> PyTree:
        trunk = _loaded(config, model, config.model, like["model"], key, besides=SCORE)
        return new_heads(key, like, frozen) | {"model": trunk}

    if lora is not None:
        base, adapter = split(abstract)
        stacked = jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), adapter)
        trained = head | {"members": stacked}
        return Part(graphdef, trained, {"model": base}, new_members, load, laid_over, flops=2 / 3)
    if config.freeze_trunk:
        return Part(graphdef, head, {"model": abstract}, new_heads, load, laid_over, flops=1 / 3)
    return Part(graphdef, head | {"model": abstract}, None, new_model, _nothing, laid_over)


def frozen_copy(config: TrainConfig, model: ModelConfig, mesh: Mesh, policy: Part, source: str | None = None) -> Part:
    """The reference: the model that training starts from, or that of `source`. With adapters it is their base."""
    if policy.frozen is not None:
        graphdef, _ = decoder_for(config, model, mesh)
        return Part(graphdef, (), policy.frozen, _nothing_trained, policy.load, _frozen_alone, flops=0.0)

    def load(like: PyTree) -> PyTree:
        return _loaded(config, model, source or config.model, like)

    return Part(policy.graphdef, (), policy.trained, _nothing_trained, load, _frozen_alone, flops=0.0)


def critic(
    config: PPOConfig,
    model: ModelConfig,
    mesh: Mesh,
    policy: Part,
    *,
    source: str | None = None,
) -> Part:
    """The critic of PPO, by `critic.shared`, `lora.rank` and the model that it starts from; no array is made.

    A trunk of its own starts from the reward model, head and all, so that the first values are the scores of unfinished
    responses. Else the head is 0, and so are the first values. With `lora.rank` the critic is a head and adapters on
    the policy's base; with `critic.shared` a head on the policy's own hidden states.

    Args:
      source: folder or hub name that a trunk of its own starts from; by default `model`.
    """
    if config.critic.shared:
        head = _head_like(config, model.hidden_size)
        return Part(policy.graphdef, head, None, _zero_head, _nothing, _trained_alone, flops=0.0)
    lora = lora_of(config.lora, model)
    if lora is not None:
        return _adapted_critic(config, model, mesh, lora)
    if source in (None, config.model):
        return _critic_from_language_model(config, model, mesh, config.model)
    if is_classifier(source):
        return _critic_from_reward_model(config, mesh, source)
    return _critic_from_language_model(config, huggingface.read_config(source), mesh, source)


def beside(policy: Part, critic: Part) -> Part:
    """Both, as {"policy": ..., "critic": ...} on the policy's frozen leaves."""

    def init(key: jax.Array, like: PyTree, frozen: PyTree) -> PyTree:
        first = policy.init(key, like["policy"], frozen)
        return {"policy": first, "critic": critic.init(jax.random.fold_in(key, CRITIC), like["critic"], frozen)}

    def assemble(params: PyTree, frozen: PyTree) -> PyTree:
        return {
            "policy": policy.assemble(params["policy"], frozen),
            "critic": critic.assemble(params["critic"], frozen),
        }

    trained = {"policy": policy.trained, "critic": critic.trained}
    flops = policy.flops + critic.flops
    return Part(policy.graphdef, trained, policy.frozen, init, policy.load, assemble, flops)


def laid_over(trained: PyTree, frozen: PyTree) -> PyTree:
    """Whole parameters of a model that scores: the heads, and the adapters or the trunk, over a frozen trunk."""
    return {**(frozen or {}), **trained}


def mergeable_reward_model(source: str) -> RewardModel:
    """A reward model that a critic can start from. Raises Mistake where it is adapters on a base of their own."""
    model = read_reward_model(source, rule="mean")  # the one rule that is linear in the hidden state
    if model.base:
        raise Mistake(
            f"reward model {source} is a LoRA ensemble on {model.base}; a critic needs one merged trunk: give "
            f"`critic.model` {model.base}"
        )
    return model


def _adapted_critic(config: PPOConfig, model: ModelConfig, mesh: Mesh, lora: Lora) -> Part:
    """Adapters and a head on the policy's frozen base."""
    graphdef, abstract = decoder_for(config, model, mesh, lora)
    like = _head_like(config, model.hidden_size) | {"model": split(abstract)[1]}

    def init(key: jax.Array, like: PyTree, base: PyTree) -> PyTree:
        return _zero_head(key, like, base) | {"model": _new_adapter(key, like["model"], base)}

    def assemble(params: PyTree, frozen: PyTree) -> PyTree:
        return params | {"model": join(params["model"], frozen)}

    return Part(graphdef, like, None, init, _nothing, assemble, flops=2 / 3)


def _critic_from_language_model(config: PPOConfig, model: ModelConfig, mesh: Mesh, source: str) -> Part:
    model = heads.trunk_config(model)
    graphdef, abstract = decoder_for(config, model, mesh)

    def init(key: jax.Array, like: PyTree, frozen: PyTree) -> PyTree:
        return _zero_head(key, like, frozen) | {"model": _loaded(config, model, source, like["model"])}

    return Part(
        graphdef, _head_like(config, model.hidden_size) | {"model": abstract}, None, init, _nothing, _trained_alone
    )


def _critic_from_reward_model(config: PPOConfig, mesh: Mesh, source: str) -> Part:
    model = mergeable_reward_model(source)
    graphdef, abstract = decoder_for(config, model.config, mesh)

    def init(key: jax.Array, like: PyTree, frozen: PyTree) -> PyTree:
        """The mean over members of (r - mean) / std is linear in the hidden state: one head and one bias."""
        on_one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: on_one_device, model.like) | {"model": _places(like["model"])}
        params = load_reward_params(model, shardings=shardings)
        head = jnp.mean(params["head"] / params["std"][:, None], axis=0, keepdims=True)
        bias = -jnp.mean(params["mean"] / params["std"], keepdims=True)
        width = like["head"].shape[1]
        if head.shape[1] > width:
            head, bias = head[:, :width], bias + head[:, width]
        first = {"head": head, "bias": bias, "model": params["model"]}
        first = {name: first[name] for name in like}  # without `critic.bias` values start at another zero than scores
        return jax.tree.map(lambda x, to: jax.device_put(x.astype(to.dtype), to.sharding), first, like)

    like = _head_like(config, model.config.hidden_size) | {"model": abstract}
    return Part(graphdef, like, None, init, _nothing, _trained_alone)


def _head_like(config: PPOConfig, width: int) -> PyTree:
    head = {"head": jax.ShapeDtypeStruct((1, width), jnp.float32)}
    return head | ({"bias": jax.ShapeDtypeStruct((1,), jnp.float32)} if config.critic.bias else {})


def _zero_head(key: jax.Array, like: PyTree, frozen: PyTree) -> PyTree:
    head = {name: like[name] for name in ("head", "bias") if name in like}
    return jax.tree.map(lambda x: jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding), head)


def _new_adapter(key: jax.Array, like: PyTree, base: PyTree) -> PyTree:
    return init_adapter(like, key, base=base, shardings=_places(like))


def _new_members(key: jax.Array, like: PyTree, base: PyTree) -> PyTree:
    """Adapters that change nothing yet, with another A for each member."""
    count = jax.tree.leaves(like)[0].shape[0]
    member = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), like)

    def make(key: jax.Array, base: PyTree) -> PyTree:
        return jax.vmap(lambda member_key: init_adapter(member, member_key, base=base))(jax.random.split(key, count))

    return jax.jit(make, out_shardings=_places(like))(key, base)


def _model_loader(config: TrainConfig, model: ModelConfig) -> Callable[[jax.Array, PyTree, PyTree], PyTree]:
    def init(key: jax.Array, like: PyTree, frozen: PyTree) -> PyTree:
        return _loaded(config, model, config.model, like, key)

    return init


def _base_loader(
    config: TrainConfig, model: ModelConfig, *, besides: tuple[str, ...] = ()
) -> Callable[[PyTree], PyTree]:
    """Reads the frozen base: the model's weights or, for config:, the random ones that a run without adapters draws."""
    kind = config.lora.quantise

    def load(like: PyTree) -> PyTree:
        key = _params_key(config)
        if not huggingface.is_random(config.model) or kind == "none":
            return _loaded(config, model, config.model, like, key, quantise=kind, besides=besides)

        def quantised(key: jax.Array) -> PyTree:
            quantised = quantise_kernels(init_params(model, key, param_dtype=config.param_dtype), kind)
            return jax.tree.map(lambda x, to: x.astype(to.dtype), quantised, like)

        return jax.jit(quantised, out_shardings=_places(like))(key)

    return load


def _loaded(
    config: TrainConfig,
    model: ModelConfig,
    source: str,
    like: PyTree,
    key: jax.Array | None = None,
    *,
    quantise: str = "none",
    besides: tuple[str, ...] = (),
) -> PyTree:
    """The weights of a folder or hub name; for config: random ones."""
    if huggingface.is_random(source):
        key = _params_key(config) if key is None else key

        def random(key: jax.Array) -> PyTree:
            params = init_params(model, key, param_dtype=config.param_dtype)
            return jax.tree.map(lambda x, to: x.astype(to.dtype), params, like)

        return jax.jit(random, out_shardings=_places(like))(key)
    return load_params(
        source,
        model,
        param_dtype=jax.tree.map(lambda x: x.dtype, like),
        shardings=_places(like),
        quantise=quantise,
        besides=besides,
    )


def _params_key(config: TrainConfig) -> jax.Array:
    """The key of a run's first parameters (`program.new_state`), so that a random reference is the random policy."""
    return jax.random.split(jax.random.key(config.seed))[0]


def _places(like: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x.sharding, like)


def _trained_alone(trained: PyTree, frozen: PyTree) -> PyTree:
    return trained


def _frozen_alone(trained: PyTree, frozen: PyTree) -> PyTree:
    return frozen


def _nothing(like: PyTree) -> None:
    return None


def _nothing_trained(key: jax.Array, like: PyTree, frozen: PyTree) -> tuple[()]:
    return ()
