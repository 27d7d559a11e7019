"""Shared parts of ppo, grpo, rloo and online-dpo: prompts, rewards, and an engine that responds."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from jaxalign.config import limits
from jaxalign.config.on_policy import RolloutConfig
from jaxalign.data.batches.plan import Plan, bucket_widths
from jaxalign.data.sets import prompts as prompt_sets
from jaxalign.data.sets.prompts import PromptBatches, Prompts
from jaxalign.mistake import Mistake
from jaxalign.models.decoder.decoder import compute_dtype
from jaxalign.models.files import huggingface
from jaxalign.models.places import device_bytes
from jaxalign.rollout.engine.choice import check_server, make_engine, publisher
from jaxalign.rollout.engine.engine import LocalEngine
from jaxalign.rollout.engine.memory import check_memory
from jaxalign.rollout.engine.slots import Sampling
from jaxalign.rollout.rewards.rewards import Rewards
from jaxalign.rollout.rollouts import BatchFn, Rollouts
from jaxalign.run import final
from jaxalign.run.run import Data, Run
from jaxalign.run.samples import RolloutSamples
from jaxalign.training import loop
from jaxalign.training.program import Recipe, abstract_state

WAY_OUT = "use fewer `slots`, a larger `mesh.tensor`, `decode_layout` training, or more devices"


class Prompting(NamedTuple):
    """The prompts of a run, their order, and what scores the responses."""

    prompts: Prompts
    batches: PromptBatches
    rewards: Rewards


def check(config: RolloutConfig) -> None:
    """Raises Mistake on settings that exclude each other."""
    limits.check(config)
    count, algorithm = config.batch_size * config.n, config.algorithm
    if huggingface.is_random(config.model):
        raise Mistake(f"`model` {config.model}: random weights say nothing to be rewarded; train them first")
    if config.max_new_tokens >= config.max_length:
        raise Mistake(
            f"`max_new_tokens` {config.max_new_tokens} leaves no room for a prompt in `max_length` {config.max_length}"
        )
    if config.temperature == 0:
        raise Mistake("`temperature` 0: greedy responses are all alike, so there is nothing to learn from them")
    parts = algorithm.minibatches * config.microbatches
    if count % parts:
        raise Mistake(
            f"{config.batch_size} prompts x {config.n} responses = {count} rows cannot be cut into "
            f"`algorithm.minibatches` {algorithm.minibatches} x `microbatches` {config.microbatches}"
        )
    if config.offload_reference and config.lora.rank:
        raise Mistake(
            f"`offload_reference` with `lora.rank` {config.lora.rank}: the reference is the base that the adapters are "
            "on, which every update needs; `lora.quantise` makes it small"
        )


def load_prompts(config: RolloutConfig, run: Run, recipe: Recipe) -> Prompting:
    """The prompts and rewards; the server of `engine` is asked whether it can be used, or the devices' memory."""
    if jax.process_count() > 1 and config.engine is not None:
        raise Mistake(f"`engine` serves a run on one host so far, not on {jax.process_count()}")
    rewards = Rewards(config.reward, seconds=config.reward_seconds)
    prompts = prompt_sets.load(
        config.data,
        run.vocabulary.tokenizer,
        max_length=config.max_length - config.max_new_tokens,
        max_dropped=config.max_dropped,
        as_chat=config.as_chat,
        elsewhere=rewards.reads,
        last_turn=config.last_turn,
    )
    rewards.check(prompts.raw, prompts.columns, later=["finished", "tokens"])
    if not run.exists:
        check_server(config)
    batches = run.counted(PromptBatches(prompts, Plan.of(config)), updates=recipe.updates)
    _check_memory(config, run, recipe, longest=max(map(len, prompts.ids)))
    return Prompting(prompts, batches, rewards)


def run_data(config: RolloutConfig, prompting: Prompting, *, fingerprint: int = 0) -> Data:
    """The run's data as its checkpoints know them; `fingerprint` is of data besides the prompts."""
    shapes = len(bucket_widths(config.max_length))
    return Data(prompting.batches, shapes, prompting.prompts.fingerprint() ^ fingerprint)


def rollouts(config: RolloutConfig, run: Run, prompting: Prompting, to_batch: BatchFn) -> Rollouts:
    """(the policy's params, step) -> (a batch of its responses, metrics), by the devices that train or by a server."""
    vocabulary = run.vocabulary
    engine = make_engine(
        config,
        run.model,
        run.lora,
        run.mesh,
        publish=publisher(
            run.folder,
            config.model,
            run.model,
            run.lora,
            tokenizer=vocabulary.tokenizer,
            generation_config=final.generation_config(config.tokenizer or config.model, vocabulary.terminators),
            dtype=compute_dtype(config.precision),
        ),
    )
    return Rollouts(
        config,
        engine,
        *prompting,
        to_batch,
        tokenizer=vocabulary.tokenizer,
        terminators=vocabulary.terminators,
        write_samples=RolloutSamples(config),
    )


def _check_memory(config: RolloutConfig, run: Run, recipe: Recipe, *, longest: int) -> None:
    """Logs the bytes of a device in generation. Raises Mistake where weights and training state do not fit."""
    engine = make_engine(config, run.model, run.lora, run.mesh, publish=None)
    if not isinstance(engine, LocalEngine):
        return
    state, frozen = abstract_state(config, recipe, run.mesh)
    params = recipe.part.assemble(state.params, frozen)
    weights, slots = engine.memory(
        params.get("policy", params),  # beside it may be a critic
        prompt=longest,
        sampling=Sampling.of(config, run.vocabulary.terminators),
    )
    check_memory(weights=weights, slots=slots, state=device_bytes((state, frozen)), way_out=WAY_OUT)


def count_rows(config: RolloutConfig, mesh: Mesh, *, responses: int) -> int:
    """Rows for `responses` to each prompt, filled up so that devices, minibatches and microbatches get equally many."""
    unit = mesh.shape["data"] * mesh.shape["fsdp"] * config.microbatches * config.algorithm.minibatches
    return -(-config.batch_size * responses // unit) * unit


def beyond_kl_budget(budget: float | None) -> Callable[[loop.Row], str | None]:
    """The reason why a row ends the run: its policy is further from the reference than the budget."""

    def last_because(row: loop.Row) -> str | None:
        if budget is None or row["kl"] <= budget:
            return None
        return f"its responses are {row['kl']:.3g} nats from the reference, beyond kl_budget {budget:g}"

    return last_because
