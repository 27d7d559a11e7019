"""Proximal policy optimisation for language models: a policy, a reference, a reward model and a critic.

The details that decide whether PPO learns, each with where it is or why it is not.

Huang et al. 2022, "The 37 implementation details of PPO",
https://iclr-blog-track.github.io/2022/03/25/ppo-implementation-details/. Core:

     1 vectorised architecture     the prompts of a step, answered side by side (rollout/engine/engine.py)
     2 orthogonal initialisation   no: the models are pretrained; the critic's head starts from the reward model, else 0
     3 Adam's epsilon 1e-5         no: 1e-8, as in RLHF since; config/shared.py: OptimizerConfig
     4 annealed learning rate      --optimizer.schedule
     5 GAE                         ops/advantages.py: gae; γ = 1, λ = 0.95
     6 minibatch updates           epochs x minibatches, rows dealt anew in each epoch (training/step.py)
     7 normalised advantages       `whiten_advantages`, over the batch, not the minibatch, so that cuts change nothing
     8 clipped surrogate           losses/policy.py: ppo_clip
     9 clipped value loss          losses/policy.py: value_clip
    10 overall loss, entropy bonus `value_coef`, `entropy_coef`
    11 global gradient clipping    --optimizer.max-grad-norm, of policy and critic apart
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
    the critic starts from the reward model                                 runs/critics.py
    a response without a terminator is penalised                            --missing-end-penalty
    the KL is paid token by token, the score at the last token              ops/advantages.py: shaped_rewards
    log-probs at sampling temperature, for π, π_old and π_ref alike         `temperature`
    no dropout, so the first ratio is 1                                     logged as first/ratio
    rewards whitened without moving their mean                              `whiten_rewards`
    the KL coefficient seeks a target                                       `kl_target`, algorithms/memory.py
    positions count real tokens; padding reaches no statistic               types.py: TokenBatch
    rejection of responses without a period, by sampling again              no: the penalty does it
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
from jaxalign.algorithms.critic import critic_values
from jaxalign.algorithms.memory import Spread, next_kl_coef
from jaxalign.algorithms.policy_gradient import ADVANTAGES, OLD, REF, SCORES, policy_inputs, rollout_metrics
from jaxalign.losses import contract
from jaxalign.losses.policy import ppo_clip, value_clip
from jaxalign.mistake import Mistake
from jaxalign.models.reading import hidden_states, shards_of
from jaxalign.ops import masked
from jaxalign.ops.advantages import gae, returns, shaped_rewards
from jaxalign.ops.kl import KL_ESTIMATORS
from jaxalign.ops.logprobs import TokenLogps, next_token_logps
from jaxalign.types import Average, PyTree, RolloutBatch

VALUES, RETURNS, GIVEN = "old_values", "returns", "given_scores"
KL_COEF, EXPLAINED, SHARE = "kl_coef", "explained_variance", "pretraining_share"
KL_PLACES = ("reward", "loss")


def ppo(
    graphdef: Any,
    critic_graphdef: Any,
    *,
    ref_graphdef: Any,
    loss: Callable = ppo_clip,
    kl_coef: float = 0.05,
    kl_target: float | None = None,
    kl_estimator: str = "k1",
    kl_in: str = "reward",
    gamma: float = 1.0,
    gae_lambda: float = 0.95,
    value_coef: float = 0.1,
    value_clip_epsilon: float | None = 0.2,
    entropy_coef: float = 0.0,
    whiten_advantages: bool = True,
    whiten_rewards: bool = False,
    normalise_scores: bool = False,
    clip_scores: float | None = None,
    pretraining_coef: float = 0.0,
    halt_kl: float | None = None,
    temperature: float = 1.0,
    epochs: int = 4,
    minibatches: int = 1,
    implementation: str | None = None,
    mesh: Mesh | None = None,
) -> Algorithm:
    """Minimise, over response tokens, loss(logps, old_logps, A) + value_coef · value_clip(V, V_old, A + V_old).

    Rewards are -kl_coef · KL on every token and the score on the last; A is GAE's, whitened; the returns are of the
    advantages before that.

    Args:
      graphdef: the policy's structure.
      critic_graphdef: that of the critic's own trunk; not read where the critic shares the policy's.
      ref_graphdef: of the reference.
      loss: one value per token, of `losses/policy.py` or your own.
      kl_coef: reward, or loss, for a nat of KL(π‖π_ref).
      kl_target: nats a response that an adaptive kl_coef seeks (`controls.py`); None: it is fixed.
      kl_estimator: k1, k2 or k3 of `ops/kl.py`, of each token. In the loss k1 does nothing on average; see there.
      kl_in: "reward", where the critic learns to expect it, or "loss".
      gamma: discount of a token.
      gae_lambda: 1 trusts the returns, 0 the critic.
      value_coef: weight of the value loss; with optimizers of their own it matters to a shared trunk alone.
      value_clip_epsilon: how far values may move from those of the rollout, in the unit of rewards; None: freely.
      entropy_coef: weight of the entropy bonus, per nat.
      whiten_advantages: to mean 0 and variance 1 over the batch's response tokens.
      whiten_rewards: the same of rewards, whose mean stays.
      normalise_scores: by mean and standard deviation of all scores so far, which the train state carries.
      clip_scores: to ± this, after that.
      pretraining_coef: weight of the mean cross-entropy of `batch.pretraining` (InstructGPT's γ, PPO-ptx).
      halt_kl: no more updates of a batch once k3 of the old policy is beyond 1.5 times this, in nats a token.
      temperature: that the tokens were drawn at.
      epochs: passes over a batch.
      minibatches: optimizer updates in each pass.
      implementation: of the log-probabilities; "pallas" is also of GAE.
      mesh: the mesh of the arrays.

    Params are {"policy": ..., "critic": ...}, as `critic.py` says. Batches are `RolloutBatch`es with the columns
    old_logps [B T], scores [B] and ended [B]. Logs, besides those of `policy_gradient.py`: `first/ratio` (1, or
    sampling and scoring disagree), `rlhf_reward` (score - kl_coef · kl, of the reward's KL), `kl_coef`, `policy_loss`,
    `value_loss`, `value_clip_fraction`, `explained_variance` (1 - Var[R - V]/Var[R] of the rollout's values),
    `returns`, and with pretraining `pretraining_loss`.

    Raises:
      Mistake: an option that cannot be.

    Reference: Schulman et al. 2017, https://arxiv.org/abs/1707.06347, eq. 9; Ouyang et al. 2022 (InstructGPT),
    https://arxiv.org/abs/2203.02155, eq. 2. Score normalisation and clipping: Zheng et al. 2023,
    https://arxiv.org/abs/2307.04964.
    """
    contract.check_inputs(loss, contract.POLICY_INPUTS)
    check(
        kl_coef=kl_coef,
        kl_target=kl_target,
        kl_estimator=kl_estimator,
        kl_in=kl_in,
        clip_scores=clip_scores,
        halt_kl=halt_kl,
        pretraining_coef=pretraining_coef,
    )
    estimate = KL_ESTIMATORS[kl_estimator]

    def logps_of(model: Any, hidden: jax.Array, rows: Any, *, at: float, entropy: bool = False) -> TokenLogps:
        return next_token_logps(
            hidden,
            model.unembed(),
            rows.tokens,
            rows.mask,
            temperature=at,
            entropy=entropy,
            implementation=implementation,
            shards=shards_of(model),
        )

    def prepare(params: PyTree, frozen: PyTree, batch: RolloutBatch) -> RolloutBatch:
        rows, own = batch.sequences, "model" in params["critic"]
        reference, hidden = hidden_states(ref_graphdef, frozen, rows)
        ref_logps = logps_of(reference, hidden, rows, at=temperature).logps
        policy_hidden = None if own else hidden_states(graphdef, params["policy"], rows)[1]
        values = critic_values(critic_graphdef, params["critic"], rows, policy_hidden)
        found = {REF: ref_logps, VALUES: jnp.where(rows.mask, values, 0.0)}
        return with_columns(batch, jax.lax.stop_gradient(found))

    def remember(carry: PyTree, batch: RolloutBatch) -> tuple[PyTree, RolloutBatch]:
        here, scores = jnp.any(batch.sequences.mask, axis=1), batch.columns[SCORES].astype(jnp.float32)
        after = dict(carry)
        if normalise_scores:
            after["scores"] = carry["scores"].seen(scores, here)
            scores = after["scores"].normalised(scores)
        if clip_scores is not None:
            scores = jnp.clip(scores, -clip_scores, clip_scores)
        coef = jnp.float32(kl_coef)
        if kl_target is not None:
            coef = carry["kl_coef"]
            kl = jnp.sum(log_ratio(batch)) / jnp.maximum(jnp.sum(here), 1)
            after["kl_coef"] = next_kl_coef(coef, kl, target=kl_target)
        return after, with_columns(batch, {GIVEN: scores, KL_COEF: jnp.full(here.shape, coef)})

    def across(batch: RolloutBatch) -> RolloutBatch:
        mask, values, coef = batch.sequences.mask, batch.columns[VALUES], batch.columns[KL_COEF][0]
        kl = estimate(log_ratio(batch)) if kl_in == "reward" else jnp.zeros_like(values)
        rewards = shaped_rewards(batch.columns[GIVEN], kl, mask, kl_coef=coef)
        if whiten_rewards:
            rewards = masked.whiten(rewards, mask, shift_mean=False)
        kernel = "pallas" if implementation == "pallas" else None
        advantages = gae(rewards, values, mask, gamma=gamma, gae_lambda=gae_lambda, implementation=kernel, mesh=mesh)
        targets = returns(advantages, values, mask)
        spread = masked.masked_var(targets, mask)
        explained = 1 - masked.masked_var(targets - values, mask) / jnp.where(spread > 0, spread, 1.0)
        found = {
            ADVANTAGES: masked.whiten(advantages, mask) if whiten_advantages else advantages,
            RETURNS: targets,
            EXPLAINED: jnp.full(mask.shape[:1], jnp.where(spread > 0, explained, 0.0)),
        }
        if batch.pretraining is not None:
            tokens = jnp.sum(batch.pretraining.mask)
            found[SHARE] = jnp.full(mask.shape[:1], jnp.sum(mask) / jnp.maximum(tokens, 1))
        return with_columns(batch, found)

    def token_loss(params: PyTree, batch: RolloutBatch) -> tuple[Average, dict[str, Average]]:
        rows, columns = batch.sequences, batch.columns
        model, hidden = hidden_states(graphdef, params["policy"], rows)
        found = logps_of(model, hidden, rows, at=temperature, entropy=True)
        values = critic_values(critic_graphdef, params["critic"], rows, hidden)
        surrogate = contract.checked(loss, policy_inputs(found.logps, batch), rows.mask.shape)
        errors = value_clip(values, columns[VALUES], columns[RETURNS], clip_epsilon=value_clip_epsilon)
        each = surrogate + value_coef * errors - entropy_coef * found.entropy
        if kl_in == "loss":
            each = each + columns[KL_COEF][:, None] * estimate(found.logps - columns[REF])
        total = Average.of(each, rows.mask)
        said = rollout_metrics(jax.lax.stop_gradient(found.logps), batch)
        said |= _ppo_metrics(batch, surrogate, errors, values, found.entropy, value_clip_epsilon)
        if pretraining_coef:
            text = batch.pretraining
            model, hidden = hidden_states(graphdef, params["policy"], text)
            kept = -logps_of(model, hidden, text, at=1.0).logps
            weight = pretraining_coef * jnp.where(text.mask, columns[SHARE][:, None], 0.0)
            total = Average(total.total + jnp.sum(weight * kept), total.count)
            said["pretraining_loss"] = Average.of(kept, text.mask)
        return total, jax.lax.stop_gradient(said)

    def halt(averages: dict[str, Average]) -> jax.Array:
        return averages["approx_kl"].compute() > 1.5 * halt_kl

    carry: dict[str, Any] = {"scores": Spread.start()} if normalise_scores else {}
    if kl_target is not None:
        carry["kl_coef"] = np.float32(kl_coef)
    return Algorithm(
        loss=token_loss,
        prepare=prepare,
        across=across,
        epochs=epochs,
        minibatches=minibatches,
        halt=None if halt_kl is None else halt,
        at_first=("ratio",),
        carry=carry,
        remember=remember,
    )


def with_columns(batch: RolloutBatch, found: dict[str, jax.Array]) -> RolloutBatch:
    """The batch that knows more of its tokens and responses."""
    return dataclasses.replace(batch, columns={**batch.columns, **found})


def log_ratio(batch: RolloutBatch) -> jax.Array:
    """log π_old - log π_ref of response tokens [B T], 0 elsewhere: what the policy that drew them had moved."""
    return jnp.where(batch.sequences.mask, batch.columns[OLD] - batch.columns[REF], 0.0)


def check(
    *,
    kl_coef: float,
    kl_target: float | None,
    kl_estimator: str,
    kl_in: str,
    clip_scores: float | None,
    halt_kl: float | None,
    pretraining_coef: float,
    **others: Any,
) -> None:
    """Raises Mistake on options of `ppo` that cannot be; those named here are the ones that are looked at."""
    for name, value, known in (("kl_estimator", kl_estimator, tuple(KL_ESTIMATORS)), ("kl_in", kl_in, KL_PLACES)):
        if value not in known:
            raise Mistake(f"{name}={value!r} is not one of {', '.join(known)}")
    if kl_in == "loss" and kl_estimator == "k1" and kl_coef:
        raise Mistake("kl_in='loss' needs k2 or k3: as a loss k1 does nothing on average")
    if kl_coef < 0 or pretraining_coef < 0:
        raise Mistake(f"kl_coef={kl_coef} and pretraining_coef={pretraining_coef} must be at least 0")
    for name, bound in (("kl_target", kl_target), ("clip_scores", clip_scores), ("halt_kl", halt_kl)):
        if bound is not None and bound <= 0:
            raise Mistake(f"{name}={bound} must be above 0, or None")
    if kl_target is not None and kl_coef == 0:
        raise Mistake(f"kl_target={kl_target} is sought by a factor on kl_coef, which must be above 0")


def _ppo_metrics(
    batch: RolloutBatch,
    surrogate: jax.Array,
    errors: jax.Array,
    values: jax.Array,
    entropy: jax.Array,
    clip_epsilon: float | None,
) -> dict[str, Average]:
    mask, here = batch.sequences.mask, jnp.any(batch.sequences.mask, axis=1)
    columns = batch.columns
    paid = columns[KL_COEF] * jnp.sum(log_ratio(batch), axis=1)
    beyond = jnp.zeros_like(mask) if clip_epsilon is None else jnp.abs(values - columns[VALUES]) > clip_epsilon
    return {
        "entropy": Average.of(entropy, mask),  # exact: the distribution is at hand
        "rlhf_reward": Average.of(columns[GIVEN] - paid, here),
        "kl_coef": Average.of(columns[KL_COEF], here),
        "policy_loss": Average.of(surrogate, mask),
        "value_loss": Average.of(errors, mask),
        "value_clip_fraction": Average.of(beyond, mask),
        "explained_variance": Average.of(columns[EXPLAINED], here),
        "returns": Average.of(columns[RETURNS], mask),
    }
