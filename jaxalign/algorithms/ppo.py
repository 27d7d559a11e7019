"""Proximal policy optimisation for language models: a policy, a reference, a reward model and a critic.

The details that decide whether PPO learns, each with its place in the code, or the reason why it is absent.

Huang et al. 2022, "The 37 implementation details of PPO",
https://iclr-blog-track.github.io/2022/03/25/ppo-implementation-details/. Core:

     1 vectorised architecture     the prompts of a step, answered side by side (rollout/engine/engine.py)
     2 orthogonal initialisation   no: the models are pretrained; the critic's head starts from the reward model, else 0
     3 Adam's epsilon 1e-5         no: 1e-8, as in RLHF since; config/shared.py: OptimizerConfig
     4 annealed learning rate      `optimizer.schedule`
     5 GAE                         ops/advantages.py: gae; γ = 1, λ = 0.95
     6 minibatch updates           epochs x minibatches, rows dealt anew in each epoch (training/step.py)
     7 normalised advantages       `whiten_advantages`, over the batch, not the minibatch, so that cuts change nothing
     8 clipped surrogate           losses/policy.py: ppo_clip
     9 clipped value loss          losses/policy.py: value_clip
    10 overall loss, entropy bonus `value_coef`, `entropy_coef`
    11 global gradient clipping    `optimizer.max_grad_norm`, of policy and critic separately
    12 debug variables             the metrics below
    13 shared or separate critic   both: algorithms/critic.py

14-22, of Atari (no-op starts, skipped frames, episodic lives, fire on reset, warped frames, sign of rewards, stacked
frames, the shared convolutions, pixels in [0, 1]): there are no frames. 23-31, of continuous actions (normal
distributions, a state-independent std, independent components, separate networks, clipped actions; normalised and
clipped observations; scaled and clipped rewards): actions are tokens; separate networks are 13, and rewards are scaled
and clipped by `normalise_scores` and `clip_scores`. 32-36, of LSTMs (layer initialisation, zero states, resets,
sequential minibatches, reconstructed states): the state of a decoder is its prompt, a row is a whole episode, and
packing is undone by segment ids. 37, independent components of multi-discrete actions: a token is one action.

Huang et al. 2024, "The N+ implementation details of RLHF with PPO", https://arxiv.org/abs/2403.17031, and Ziegler et
al.'s code, https://arxiv.org/abs/1909.08593:

    the reward model is read at the terminator, from lengths, not ids       models/files/reward.py
    the critic starts from the reward model                                 training/part.py: critic
    a response without a terminator is penalised                            `missing_end_penalty`
    the KL is paid token by token, the score at the last token              ops/advantages.py: shaped_rewards
    log-probs at sampling temperature, for π, π_old and π_ref alike         `temperature`
    no dropout, so the first ratio is 1                                     logged as first/ratio
    rewards whitened without moving their mean                              `whiten_rewards`
    the KL coefficient seeks a target                                       `kl_target`, algorithms/memory.py
    positions count real tokens; padding reaches no statistic               types.py: TokenBatch
    rejection of responses without a period, by sampling again              no: the penalty does it

TRL 1.12, the last with PPO (trl/experimental/ppo/ppo_trainer.py), differs; these settings give its numbers:

    the score is earned one position past the last token, where the response is shorter than its limit: that position
    has a value and a return, rewards are whitened over it too, and the value loss is a mean over one position more than
    the policy's                                                            `score_at` after
    the critic's head has no bias                                           `critic.bias` off
    gradients are not clipped, whatever max_grad_norm is                    `optimizer.max_grad_norm` 0
    minibatches add no updates: one for each epoch                          `minibatches` 1
    sampling at temperature 0.7                                             `temperature` 0.7
    the learning rate falls once for each batch of responses                not here: once for each update
    means of `policy/approxkl_avg` and the like count padding               not here
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxalign.algorithms.base import Algorithm
from jaxalign.algorithms.columns import with_columns
from jaxalign.algorithms.critic import critic_values
from jaxalign.algorithms.memory import Spread, next_kl_coef
from jaxalign.algorithms.policy_gradient import (
    ADVANTAGES,
    REF_LOGPS,
    SCORES,
    log_ratio,
    policy_inputs,
    rollout_metrics,
)
from jaxalign.config import limits
from jaxalign.config.on_policy import PPOAlgorithm
from jaxalign.losses import contract
from jaxalign.losses.policy import value_clip
from jaxalign.mistake import Mistake
from jaxalign.models.reading import hidden_states, token_logps, token_stats
from jaxalign.ops import masked
from jaxalign.ops.advantages import gae, returns, shaped_rewards
from jaxalign.ops.kl import KL_ESTIMATORS
from jaxalign.types import Average, PyTree, RolloutBatch

VALUES, RETURNS = "old_values", "returns"  # columns [B T]
REWARDED_SCORES, KL_COEF = "rewarded_scores", "kl_coef"  # columns [B]; the scores are normalised and clipped
EXPLAINED, SHARE = "explained_variance", "pretraining_share"  # columns [B], of the whole batch
VALUE_SHARE = "value_share"  # column [B]: response tokens for each position whose value counts


def ppo(
    config: PPOAlgorithm,
    policy: Any,
    critic: Any,
    reference: Any,
    *,
    loss: Callable,
    temperature: float = 1.0,
    longest: int | None = None,
    implementation: str | None = None,
    mesh: Mesh | None = None,
) -> Algorithm:
    """Minimise, over response tokens, loss(logps, old_logps, A) + value_coef · value_clip(V, V_old, A + V_old).

    Rewards are -kl_coef · KL on every token and the score on the last; A is GAE's, whitened; the returns are of the
    advantages before that.

    Args:
      config: coefficients and choices.
      policy: graphdef of the model that is trained.
      critic: graphdef of the critic's own trunk; not read where the critic shares the policy's.
      reference: graphdef of the frozen reference.
      loss: one value per token; its parameters name its inputs (`losses/contract.py`: POLICY_INPUTS).
      temperature: of sampling. Ratios are of tempered policies, so the first is 1.
      longest: number of tokens of the longest possible response, for `score_at` 'after'.
      implementation: an implementation of `ops/logprobs.py`; "pallas" is also that of GAE. None is the default.
      mesh: the mesh of the arrays.

    Params are {"policy": ..., "critic": ...}, as `critic.py` says. Batches are `RolloutBatch`es with the columns
    old_logps [B T], scores [B] and ended [B]. Logs, besides those of `policy_gradient.py`: `first/ratio` (1, or
    sampling and scoring disagree), `rlhf_reward` (score - kl_coef · kl, of the reward's KL), `kl_coef`, `policy_loss`,
    `value_loss`, `value_clip_fraction`, `explained_variance` (1 - Var[R - V]/Var[R] of the rollout's values),
    `returns`, and with pretraining `pretraining_loss`.

    Raises:
      Mistake: a setting outside its limits, or settings that exclude each other.

    Reference: Schulman et al. 2017, https://arxiv.org/abs/1707.06347, eq. 9; Ouyang et al. 2022 (InstructGPT),
    https://arxiv.org/abs/2203.02155, eq. 2. Score normalisation and clipping: Zheng et al. 2023,
    https://arxiv.org/abs/2307.04964.
    """
    contract.check_inputs(loss, contract.POLICY_INPUTS)
    check(config)
    if config.score_at == "after" and not longest:
        raise Mistake("`algorithm.score_at` 'after' asks which responses have room behind them: give longest=")
    update = _Update(config, policy, critic, reference, loss, temperature, longest, implementation, mesh)
    carry: dict[str, Any] = {"scores": Spread.start()} if config.normalise_scores else {}
    if config.kl_target is not None:
        carry["kl_coef"] = np.float32(config.kl_coef)
    return Algorithm(
        loss=update.token_loss,
        prepare=update.prepare,
        across=update.across,
        epochs=config.epochs,
        minibatches=config.minibatches,
        halt=None if config.halt_kl is None else update.halt,
        at_first=("ratio",),
        carry=carry,
        remember=update.remember,
    )


def check(config: PPOAlgorithm) -> None:
    """Raises Mistake on a setting outside its limits, and on settings that exclude each other."""
    limits.check(config, prefix="algorithm.")
    if config.kl_in == "loss" and config.kl_estimator == "k1" and config.kl_coef:
        raise Mistake(
            "`algorithm.kl_in` loss needs `algorithm.kl_estimator` k2 or k3: the gradient of k1 is 0 on average"
        )
    if config.kl_target is not None and config.kl_coef == 0:
        raise Mistake(
            f"`algorithm.kl_target` {config.kl_target:g} is sought by a factor on `algorithm.kl_coef`, which must be "
            "above 0"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class _Update:
    """The functions of PPO's `Algorithm`, in the order in which they run; the fields are `ppo`'s arguments."""

    config: PPOAlgorithm
    policy: Any
    critic: Any
    reference: Any
    loss: Callable
    temperature: float
    longest: int | None
    implementation: str | None
    mesh: Mesh | None

    def prepare(self, params: PyTree, frozen: PyTree, batch: RolloutBatch) -> RolloutBatch:
        """Adds the reference's log-probabilities and the critic's values."""
        rows, has_trunk = batch.sequences, "model" in params["critic"]
        ref_logps = token_logps(
            self.reference, frozen, rows, temperature=self.temperature, implementation=self.implementation
        )
        policy_hidden = None if has_trunk else hidden_states(self.policy, params["policy"], rows)[1]
        values = critic_values(self.critic, params["critic"], rows, policy_hidden)
        columns = {REF_LOGPS: ref_logps, VALUES: jnp.where(self.valued(rows.mask), values, 0.0)}
        return with_columns(batch, jax.lax.stop_gradient(columns))

    def remember(self, carry: PyTree, batch: RolloutBatch) -> tuple[PyTree, RolloutBatch]:
        """Adds the scores that are rewarded and the KL coefficient, and moves both statistics on."""
        config = self.config
        present, scores = jnp.any(batch.sequences.mask, axis=1), batch.columns[SCORES].astype(jnp.float32)
        after = dict(carry)
        if config.normalise_scores:
            after["scores"] = carry["scores"].seen(scores, present)
            scores = after["scores"].normalised(scores)
        if config.clip_scores is not None:
            scores = jnp.clip(scores, -config.clip_scores, config.clip_scores)
        coef = jnp.float32(config.kl_coef)
        if config.kl_target is not None:
            coef = carry["kl_coef"]
            kl = jnp.sum(log_ratio(batch)) / jnp.maximum(jnp.sum(present), 1)
            after["kl_coef"] = next_kl_coef(coef, kl, target=config.kl_target)
        return after, with_columns(batch, {REWARDED_SCORES: scores, KL_COEF: jnp.full(present.shape, coef)})

    def across(self, batch: RolloutBatch) -> RolloutBatch:
        """Adds advantages and returns, whitened over all response tokens, and statistics of the whole batch."""
        config, mask, values = self.config, batch.sequences.mask, batch.columns[VALUES]
        valued, coef = self.valued(mask), batch.columns[KL_COEF][0]
        kl = self.kl(log_ratio(batch)) if config.kl_in == "reward" else jnp.zeros_like(values)
        rewards = shaped_rewards(batch.columns[REWARDED_SCORES], kl, valued, kl_coef=coef)
        if config.whiten_rewards:
            rewards = masked.whiten(rewards, valued, shift_mean=False)
        advantages = gae(
            rewards,
            values,
            valued,
            gamma=config.gamma,
            gae_lambda=config.gae_lambda,
            implementation="pallas" if self.implementation == "pallas" else None,
            mesh=self.mesh,
        )
        targets = returns(advantages, values, valued)
        variance = masked.masked_var(targets, valued)
        explained = 1 - masked.masked_var(targets - values, valued) / jnp.where(variance > 0, variance, 1.0)
        columns = {
            ADVANTAGES: masked.whiten(advantages, mask) if config.whiten_advantages else advantages,
            RETURNS: targets,
            EXPLAINED: jnp.full(mask.shape[:1], jnp.where(variance > 0, explained, 0.0)),
        }
        if config.score_at == "after":
            columns[VALUE_SHARE] = jnp.full(mask.shape[:1], jnp.sum(mask) / jnp.maximum(jnp.sum(valued), 1))
        if batch.pretraining is not None:
            tokens = jnp.sum(batch.pretraining.mask)
            columns[SHARE] = jnp.full(mask.shape[:1], jnp.sum(mask) / jnp.maximum(tokens, 1))
        return with_columns(batch, columns)

    def token_loss(self, params: PyTree, batch: RolloutBatch) -> tuple[Average, dict[str, Average]]:
        """(the loss, the metrics)"""
        config, rows, columns = self.config, batch.sequences, batch.columns
        model, hidden = hidden_states(self.policy, params["policy"], rows)
        token = token_stats(
            model, hidden, rows, temperature=self.temperature, entropy=True, implementation=self.implementation
        )
        values = critic_values(self.critic, params["critic"], rows, hidden)
        surrogate = contract.checked(self.loss, policy_inputs(token.logps, batch), rows.mask.shape)
        errors = value_clip(values, columns[VALUES], columns[RETURNS], clip_epsilon=config.value_clip_epsilon)
        of_values = config.value_coef * errors
        losses = surrogate + (of_values if config.score_at == "last" else 0.0) - config.entropy_coef * token.entropy
        if config.kl_in == "loss":
            losses = losses + columns[KL_COEF][:, None] * self.kl(token.logps - columns[REF_LOGPS])
        total, valued = Average.of(losses, rows.mask), self.valued(rows.mask)
        if config.score_at == "after":  # a mean over more positions, whose share is that of the whole batch
            mean = columns[VALUE_SHARE][:, None] * of_values
            total = Average(total.total + jnp.sum(jnp.where(valued, mean, 0.0)), total.count)
        metrics = rollout_metrics(jax.lax.stop_gradient(token.logps), batch)
        metrics |= _ppo_metrics(batch, valued, surrogate, errors, values, token.entropy, config.value_clip_epsilon)
        if config.pretraining_coef:
            text = batch.pretraining
            text_losses = -token_logps(
                self.policy, params["policy"], text, temperature=1.0, implementation=self.implementation
            )
            weight = config.pretraining_coef * jnp.where(text.mask, columns[SHARE][:, None], 0.0)
            total = Average(total.total + jnp.sum(weight * text_losses), total.count)
            metrics["pretraining_loss"] = Average.of(text_losses, text.mask)
        return total, jax.lax.stop_gradient(metrics)

    def valued(self, mask: jax.Array) -> jax.Array:
        """Bool[B T], True where a value counts: on response tokens and, if the score is earned after them, there."""
        if self.config.score_at == "last":
            return mask
        after = (masked.last_token_index(mask) + 1)[:, None]
        lengths = jnp.sum(mask, axis=1, keepdims=True)
        return mask | ((jnp.arange(mask.shape[1])[None, :] == after) & (lengths > 0) & (lengths < self.longest))

    def halt(self, averages: dict[str, Average]) -> jax.Array:
        """True once k3 of the old policy is beyond 1.5 times `halt_kl`."""
        return averages["approx_kl"].compute() > 1.5 * self.config.halt_kl

    def kl(self, log_ratios: jax.Array) -> jax.Array:
        """The KL's estimate from each token's log-ratio."""
        return KL_ESTIMATORS[self.config.kl_estimator](log_ratios)


def _ppo_metrics(
    batch: RolloutBatch,
    valued: jax.Array,
    surrogate: jax.Array,
    errors: jax.Array,
    values: jax.Array,
    entropy: jax.Array,
    clip_epsilon: float | None,
) -> dict[str, Average]:
    mask, present = batch.sequences.mask, jnp.any(batch.sequences.mask, axis=1)
    columns = batch.columns
    penalty = columns[KL_COEF] * jnp.sum(log_ratio(batch), axis=1)
    beyond = jnp.zeros_like(mask) if clip_epsilon is None else jnp.abs(values - columns[VALUES]) > clip_epsilon
    return {
        "entropy": Average.of(entropy, mask),  # exact, from the whole distribution
        "rlhf_reward": Average.of(columns[REWARDED_SCORES] - penalty, present),
        "kl_coef": Average.of(columns[KL_COEF], present),
        "policy_loss": Average.of(surrogate, mask),
        "value_loss": Average.of(errors, valued),
        "value_clip_fraction": Average.of(beyond, valued),
        "explained_variance": Average.of(columns[EXPLAINED], present),
        "returns": Average.of(columns[RETURNS], valued),
    }
