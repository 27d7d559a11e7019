"""`jaxalign ppo`: a model, prompts and a reward in, a policy that earns more of it out, with a critic's help."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from jaxalign import hosts
from jaxalign.algorithms.follow import follow
from jaxalign.algorithms.ppo import check as check_algorithm
from jaxalign.algorithms.ppo import ppo
from jaxalign.commands import on_policy
from jaxalign.config.on_policy import PPOConfig
from jaxalign.data.batches.plan import Plan, bucket_widths
from jaxalign.data.batches.rows import TrainBatches
from jaxalign.data.sets import supervised
from jaxalign.losses import POLICY, select_loss
from jaxalign.mistake import Mistake
from jaxalign.models.decoder.config import ModelConfig
from jaxalign.models.files import huggingface
from jaxalign.rollout.batches import to_rollout_batch
from jaxalign.rollout.rewards.rewards import reward_models
from jaxalign.rollout.rollouts import SourceFn
from jaxalign.rollout.scored import ScoredResponses
from jaxalign.run import final
from jaxalign.run.run import Run
from jaxalign.training import part
from jaxalign.training.program import Recipe, implementation
from jaxalign.types import RolloutBatch

log = logging.getLogger(__name__)


@hosts.failing_together()
def main(config: PPOConfig) -> int:
    """Trains and exports; the exit status is 0, or 128 + the number of the signal that stopped the run."""
    check(config)
    run = Run.open(config, "ppo")
    plan = recipe(config, run.model, run.mesh)
    prompting = on_policy.load_prompts(config, run, plan)
    text = _pretraining(config, run)
    fingerprint = text.mixture.examples.fingerprint() if text else 0
    data = on_policy.run_data(config, prompting, fingerprint=fingerprint)
    if not run.claim(data):
        return 0
    rows = on_policy.count_rows(config, run.mesh, responses=config.n)
    responses = on_policy.rollouts(config, run, prompting, functools.partial(to_batch, config, text, rows))
    outcome = run.fit(
        plan, data, source=_of_policy(responses), last_because=on_policy.beyond_kl_budget(config.kl_budget)
    )
    return final.language_model(run, outcome, among="policy")  # the critic stays in the checkpoints


def recipe(config: PPOConfig, model: ModelConfig, mesh: Mesh) -> Recipe:
    """The policy, whole or as adapters, beside its critic; the reference, fixed or moving; and PPO's loss."""
    policy = part.language_model(config, model, mesh)
    reference = part.frozen_copy(config, model, mesh, policy)
    critic = part.critic(config, model, mesh, policy, source=critic_source(config))
    algorithm = ppo(
        config.algorithm,
        policy.graphdef,
        critic.graphdef,
        reference.graphdef,
        loss=_loss(config),
        temperature=config.temperature,
        longest=config.max_new_tokens,
        implementation=implementation(config),
        mesh=mesh,
    )._replace(rows=config.batch_size * config.n)
    update = config.ref_update
    if update.every:
        move = follow(alpha=update.alpha, every=update.every)
        algorithm = algorithm._replace(follow=lambda ref, params, step: move(ref, params["policy"], step))
    return Recipe(
        part.beside(policy, critic),
        algorithm,
        reference,
        critic_learning_rate=config.critic.learning_rate,
        critic_forwards=int(critic.flops > 0),
        offload=config.offload_reference,
    )


def check(config: PPOConfig) -> None:
    """Raises Mistake on a loss that cannot be used, or on settings that exclude each other."""
    on_policy.check(config)
    _loss(config)
    algorithm = config.algorithm
    check_algorithm(algorithm)
    if config.critic.model and (config.critic.shared or config.lora.rank):
        other = "`critic.shared`" if config.critic.shared else f"`lora.rank` {config.lora.rank}"
        raise Mistake(f"`critic.model` {config.critic.model} is a model of its own; leave out {other}, or it")
    if config.ref_update.every and config.lora.rank:
        raise Mistake("`ref_update.every` with `lora.rank`: the base that adapters are on cannot follow the policy")
    if config.ref_update.every and config.offload_reference:
        raise Mistake(
            "`offload_reference` needs a frozen reference, and `ref_update.every` makes it move; drop one of the two"
        )
    if config.ref_update.alpha > 1:
        raise Mistake(f"`ref_update.alpha` {config.ref_update.alpha}: it must be at most 1, which copies the policy")
    if bool(algorithm.pretraining_coef) != bool(config.pretraining_data):
        raise Mistake(
            "PPO-ptx needs both `pretraining_data` and `algorithm.pretraining_coef` above 0; give both or neither"
        )


def critic_source(config: PPOConfig) -> str:
    """The model that a critic of its own starts from: `critic.model`, the first fitting reward model, or `model`."""
    if config.critic.shared or config.lora.rank:
        return config.model
    if config.critic.model:
        _check_tokenizer(config, config.critic.model)
        return config.critic.model
    for folder in reward_models(config.reward):
        try:
            part.mergeable_reward_model(folder)
            _check_tokenizer(config, folder)
        except Mistake as mistake:
            log.info("%s; the critic does not start from it", mistake)
        else:
            return folder
    return config.model


def to_batch(
    config: PPOConfig,
    text: TrainBatches | None,
    rows: int,
    responses: ScoredResponses,
    prompts: Sequence[tuple[int, ...]],
    width: int,
    step: int,
) -> tuple[RolloutBatch, dict[str, float]]:
    """Responses behind their prompts and, for PPO-ptx, as many rows of text."""
    if config.algorithm.score_at == "after":  # a position behind each response that could have been longer
        lengths = [(len(prompt), len(r.tokens)) for prompt, r in zip(prompts, responses.responses, strict=True)]
        longest = max(p + min(length + 1, config.max_new_tokens) for p, length in lengths)
        width = next(wide for wide in bucket_widths(config.max_length) if wide >= longest)
    batch = to_rollout_batch(responses, prompts, width=width, rows=rows)
    if text is None:
        return batch, {}
    filling = ((0, rows - text.plan.batch_size), (0, 0))
    return dataclasses.replace(batch, pretraining=jax.tree.map(lambda x: np.pad(x, filling), text[step])), {}


def _of_policy(responses: SourceFn) -> SourceFn:
    """The source, given the policy among the params that the algorithm sees."""
    return lambda params, step: responses(params["policy"], step)


def _loss(config: PPOConfig) -> Callable:
    return select_loss(config.algorithm.loss, POLICY)


def _check_tokenizer(config: PPOConfig, source: str) -> None:
    ours, theirs = (huggingface.load_tokenizer(x).get_vocab() for x in (config.tokenizer or config.model, source))
    if ours != theirs:
        raise Mistake(
            f"{source} has another tokenizer than the policy, so it reads other tokens; name a critic with the "
            "policy's tokenizer: `critic.model`, or leave it out to start from `model`"
        )


def _pretraining(config: PPOConfig, run: Run) -> TrainBatches | None:
    """Step n -> as many rows of text as there are responses."""
    if config.pretraining_data is None:
        return None
    options = supervised.Options.of(config, run.vocabulary.terminators)
    data = supervised.load(config.pretraining_data, run.vocabulary.tokenizer, options)
    plan = Plan(config.batch_size * config.n, config.max_length, seed=config.seed)
    return TrainBatches(data.train, plan, steps=2**31)
