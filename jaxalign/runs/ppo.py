"""`jaxalign ppo`: a model, prompts and a reward in, a policy that earns more of it out, with a critic's help."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from jax.sharding import Mesh

from jaxalign.algorithms.follow import follow
from jaxalign.algorithms.ppo import check, ppo
from jaxalign.config.on_policy import PPOAlgorithm, PPOConfig
from jaxalign.data.batches.rows import Plan, TrainBatches
from jaxalign.data.sets import supervised
from jaxalign.losses.policy import POLICY_LOSSES
from jaxalign.mistake import Mistake
from jaxalign.rollout.batches import rollout_batch
from jaxalign.runs import critics, rollouts, train
from jaxalign.runs.program import Method, implementation
from jaxalign.runs.rollouts import Judged
from jaxalign.runs.sft import data_options
from jaxalign.select import select
from jaxalign.training.state import TrainState
from jaxalign.types import RolloutBatch


def run(config: PPOConfig) -> int:
    """Trains and exports; the exit status is 0, or 128 + the number of the signal that stopped the run."""
    return train.run(config, "ppo", _gather)


def _gather(config: PPOConfig, starts: bool) -> train.Task:
    _check(config)
    base, asked = rollouts.gather(config, starts)
    critic = critics.plan(config, base, list(asked.rewards.models.values()))
    text = _pretraining(config, base)

    return rollouts.task_of(
        config,
        base,
        asked,
        method_of(config, base.mesh, critic),
        functools.partial(_batch, text),
        fingerprint=text.mixture.examples.fingerprint() if text else 0,
        export=_export,
        policy_of=lambda params: params["policy"],
    )


def method_of(config: PPOConfig, mesh: Mesh, critic: critics.Plan) -> Method:
    """What is compiled of a config."""
    algorithm, loss = config.algorithm, select(config.algorithm.loss, POLICY_LOSSES)

    def build(graphdef: Any, ref_graphdef: Any) -> Any:
        return ppo(
            graphdef,
            critic.graphdef,
            ref_graphdef=ref_graphdef,
            **_settings(algorithm) | {"loss": loss},
            temperature=config.temperature,
            implementation=implementation(config),
            mesh=mesh,
        )

    return Method(
        build,
        reference=True,
        offload=config.offload_reference,
        follow=follow(alpha=config.ref_update.alpha, every=config.ref_update.every)
        if config.ref_update.every
        else None,
        epochs=algorithm.epochs,
        updates=algorithm.epochs * algorithm.minibatches,
        critic=critic.critic,
    )


def _check(config: PPOConfig) -> None:
    algorithm = config.algorithm
    select(algorithm.loss, POLICY_LOSSES)
    check(**_settings(algorithm))
    if config.ref_update.every and config.lora.rank:
        raise Mistake("`ref_update.every` with `lora.rank`: the base that adapters are on cannot follow the policy")
    if config.ref_update.every and config.offload_reference:
        raise Mistake("`ref_update.every` with `offload_reference`: a reference that moves is a part of the state")
    if bool(algorithm.pretraining_coef) != bool(config.pretraining_data):
        raise Mistake(
            f"`algorithm.pretraining_coef` {algorithm.pretraining_coef:g} and `pretraining_data` "
            f"{config.pretraining_data}: text to keep likely and its weight belong together"
        )


def _settings(algorithm: PPOAlgorithm) -> dict[str, Any]:
    """As keywords of `ppo`."""
    return {f.name: getattr(algorithm, f.name) for f in dataclasses.fields(algorithm)}


def _pretraining(config: PPOConfig, base: train.Base) -> TrainBatches | None:
    """Step n -> as many rows of text as there are responses."""
    if config.pretraining_data is None:
        return None
    options = data_options(dataclasses.replace(config, eval_share=0.0), base.vocabulary.terminators)
    data = supervised.load(config.pretraining_data, base.vocabulary.tokenizer, options)
    rows = rollouts.count_rows(config, base.mesh)
    return TrainBatches(data.train, Plan(rows, config.max_length, seed=config.seed), steps=2**31)


def _batch(text: TrainBatches | None, judged: Judged) -> tuple[RolloutBatch, dict[str, float]]:
    batch = rollout_batch(judged.prompts, judged.responses, scores=judged.scores, width=judged.width, rows=judged.rows)
    return dataclasses.replace(batch, pretraining=None if text is None else text[judged.step]), {}


def _export(task: train.Task, state: TrainState, frozen: Any) -> None:
    """`final/` is the policy; the critic stays in the checkpoints."""
    train.export_language_model(task, dataclasses.replace(state, params=state.params["policy"]), frozen)
