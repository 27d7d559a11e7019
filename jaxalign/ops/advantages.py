"""Rewards, advantages and returns of tokens, from scores and critic values.

The time index: values[:, t] is the critic before token t is chosen, and advantages[:, t] multiplies logps[:, t].
The mask is True exactly on the tokens that the policy chose; other positions are not read.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from jaxalign.kernels import gae as kernel
from jaxalign.kernels.products import times
from jaxalign.mistake import Mistake
from jaxalign.ops import masked
from jaxalign.ops.mesh import kernel_target, row_axes

IMPLEMENTATIONS = ("scan", "associative", "matmul", "pallas")
TILE = 128  # positions of a tile of "matmul": the width of a TPU's matrix unit


def shaped_rewards(
    scores: Float[Array, "B"],
    kl: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    kl_coef: float | Float[Array, ""],
) -> Float[Array, "B T"]:
    """-kl_coef · kl on every response token, plus the score on the last of them.

    Args:
      scores: one for each response, from the reward model.
      kl: an estimate of KL(π‖π_ref) for each token, such as log π - log π_ref, in nats.
      mask: response tokens. In a row without any all rewards are 0, whatever its score.
      kl_coef: reward per nat.

    Reference: Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, eq. 2, spread over the tokens.
    """
    last = masked.last_token_index(mask)
    is_last = jnp.arange(mask.shape[1])[None, :] == last[:, None]
    rewards = -kl_coef * kl.astype(jnp.float32) + jnp.where(is_last, scores.astype(jnp.float32)[:, None], 0.0)
    return jnp.where(mask, rewards, 0.0)


def gae(
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    gamma: float,
    gae_lambda: float,
    implementation: str | None = None,
    mesh: Mesh | None = None,
    rows: tuple[str, ...] = ("data", "fsdp"),
) -> Float[Array, "B T"]:
    """A_t = Σ_k (γλ)^k δ_{t+k}, with δ_t = r_t + γ V_{t+1} - V_t: generalised advantage estimation.

    The sum runs over the True positions only: t + 1 is the next True one, however far, and V after the last is 0. A
    hole, such as a tool's output inside a response, adds no discount; its reward and value are not read.

    Args:
      rewards: r_t for choosing token t.
      values: V_t, the critic before token t is chosen.
      mask: tokens that the policy chose.
      gamma: discount of a token, in [0, 1]; 1 is usual for text.
      gae_lambda: 0 gives the TD error δ, 1 the discounted return minus the value.
      implementation: all compute the same. "scan" is the definition, T steps one after the other; "associative" log₂ T
        rounds over whole arrays; "matmul" T/128 products with a triangular matrix of powers of γλ, after holes are
        removed; "pallas" a kernel, interpreted on a CPU. None is "scan" on a CPU, where it was measured to be the
        fastest, and "associative" on other platforms, where nothing has been measured yet.
      mesh: the mesh of the arrays, which only "pallas" reads; XLA partitions the others.
      rows: the mesh axes that cut B.

    Returns:
      Advantages in float32, 0 where the mask is False.

    Raises:
      Mistake: an unknown implementation, or gamma or gae_lambda outside [0, 1], or B that the mesh does not divide.

    Reference: Schulman et al. 2016, https://arxiv.org/abs/1506.02438, eq. 16.
    """
    for name, value in {"gamma": gamma, "gae_lambda": gae_lambda}.items():
        if not 0.0 <= value <= 1.0:
            raise Mistake(f"{name}={value} is not in [0, 1]")
    if implementation not in (None, *IMPLEMENTATIONS):
        raise Mistake(f"implementation={implementation!r} is not one of {IMPLEMENTATIONS}, None")
    options = {"gamma": gamma, "gae_lambda": gae_lambda}
    if implementation is None:
        # experiments/benchmarks/kernel_speed.py; off the CPU the T dependent steps of a scan are T launches
        implementation = "scan" if kernel_target(mesh).interpret else "associative"
    if implementation == "scan":
        return kernel.gae_reference(rewards, values, mask, **options)
    if implementation == "pallas":
        run = functools.partial(kernel.gae, target=kernel_target(mesh), **options)
        cut = P(row_axes(mesh, rows, rewards.shape[0]), None) if mesh is not None else None
        # rows are independent, so no device needs another's; check_vma is off since a kernel declares no varying axes
        on = jax.shard_map(run, mesh=mesh, in_specs=cut, out_specs=cut, check_vma=False) if mesh is not None else run
        return on(rewards, values, mask)
    rewards, values = kernel.clean(rewards, mask), kernel.clean(values, mask)
    delta = jnp.where(mask, rewards + gamma * _next(values, mask) - values, 0.0)
    solve = _associative if implementation == "associative" else _matmul
    return jnp.where(mask, solve(delta, mask, gamma * gae_lambda), 0.0)


def returns(
    advantages: Float[Array, "B T"], values: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """advantages + values, the critic's targets, from advantages before whitening; 0 where the mask is False."""
    return jnp.where(mask, advantages + values.astype(jnp.float32), 0.0)


def _next(values: jax.Array, mask: jax.Array) -> jax.Array:
    """The value at the next True position; 0 after the last."""
    length = values.shape[1]
    index = jnp.where(mask, jnp.arange(length)[None, :], length)
    after = jnp.pad(index[:, 1:], ((0, 0), (0, 1)), constant_values=length)
    after = jax.lax.cummin(after, axis=1, reverse=True)
    return jnp.take_along_axis(jnp.pad(values, ((0, 0), (0, 1))), after, axis=1)


def _associative(delta: jax.Array, mask: jax.Array, decay: float) -> jax.Array:
    """A = δ + a A_next, with a = γλ where the mask is True and 1 in a hole: affine maps compose in any grouping."""

    def compose(later, earlier):
        return earlier[0] * later[0], earlier[1] + earlier[0] * later[1]

    factor = jnp.where(mask, jnp.float32(decay), 1.0)
    return jax.lax.associative_scan(compose, (factor, delta), axis=1, reverse=True)[1]


def _matmul(delta: jax.Array, mask: jax.Array, decay: float) -> jax.Array:
    """After holes are removed, a tile's deltas times the triangle (γλ)^(s - t), plus the discounted next tile."""
    rows, length = delta.shape
    row = jnp.arange(rows)[:, None]
    place = jnp.cumsum(mask, axis=1) - 1  # index of a True position among those of its row
    width = -(-length // TILE) * TILE
    packed = jnp.zeros((rows, width)).at[row, jnp.where(mask, place, width)].set(delta, mode="drop")
    steps = jnp.arange(TILE)[:, None] - jnp.arange(TILE)[None, :]  # [s t]
    triangle = jnp.where(steps >= 0, jnp.float32(decay) ** jnp.maximum(steps, 0), 0.0)
    from_after = jnp.float32(decay) ** (TILE - jnp.arange(TILE))

    def solve(after: jax.Array, tile: jax.Array) -> tuple[jax.Array, jax.Array]:
        advantages = jnp.matmul(tile, triangle, precision="highest") + after[:, None] * from_after[None, :]
        return advantages[:, 0], advantages

    tiles = packed.reshape(rows, width // TILE, TILE).swapaxes(0, 1)
    _, solved = jax.lax.scan(solve, jnp.zeros(rows), tiles, reverse=True)
    return jnp.take_along_axis(solved.swapaxes(0, 1).reshape(rows, width), jnp.maximum(place, 0), axis=1)


SCALES = ("group", "batch", "scores", "none")


def group_advantages(scores: Float[Array, "N G"], *, scale: str = "group", eps: float = 1e-4) -> Float[Array, "N G"]:
    """Scores relative to those of the other responses to the same prompt.

    (s - mean_g s) / (std + eps), with the standard deviation of n - 1 degrees of freedom.

    Args:
      scores: scores of G responses to each of N prompts.
      scale: the numbers whose std it is: "group", the prompt's own scores (GRPO); "batch", s - mean_g s of all prompts,
        so that advantages have variance 1 over the batch (REINFORCE++ with baseline); "scores", all scores, however far
        the prompts' means lie apart (TRL's scale_rewards="batch"); "none", no division (Dr. GRPO: dividing favours
        prompts whose scores hardly differ).
      eps: added to the std.

    Returns:
      Float32, of mean 0 over each group; all 0 in a group of equal scores. The groups (0, 1), (10, 11), (20, 21),
      (30, 31) have ±0.707 under "group", ±0.935 under "batch" and ±0.042 under "scores".

    Reference: Shao et al. 2024, https://arxiv.org/abs/2402.03300, section 4.1.2; Liu et al. 2025,
    https://arxiv.org/abs/2503.20783; Hu et al. 2025, https://arxiv.org/abs/2501.03262 (v9), "REINFORCE++ w/ Baseline":
    the group's mean is subtracted, then mean and std of the batch are taken of what is left, whose mean is 0.
    """
    if scale not in SCALES:
        raise Mistake(f"scale={scale!r} is not one of {', '.join(SCALES)}")
    if scores.shape[1] < 2:
        raise Mistake("a group of one response has no baseline; draw 2 or more for each prompt")
    scores = scores.astype(jnp.float32)
    # Relative to the first of the group: the mean of equal scores may be off by a rounding, which Adam, whose steps do
    # not depend on the scale of gradients, would turn into a full step.
    apart = scores - scores[:, :1]
    centred = apart - jnp.mean(apart, axis=1, keepdims=True)
    if scale == "none":
        return centred
    if scale == "group":
        return centred / (jnp.std(apart, axis=1, keepdims=True, ddof=1) + eps)
    return centred / (jnp.std(centred if scale == "batch" else scores, ddof=1) + eps)


def batch_advantages(scores: Float[Array, "N G"], *, eps: float = 1e-4) -> Float[Array, "N G"]:
    """(s - mean s) / (std + eps) over all responses of the batch, whatever their prompts: REINFORCE++.

    The baseline is one for all prompts, so one response to each is enough. In the paper the score is less a KL penalty
    of the tokens that follow before it is normalised; here the KL is in the loss (`kl_coef`).

    Args:
      scores: scores of G >= 1 responses to each of N prompts.
      eps: added to the std, of n - 1 degrees of freedom.

    Returns:
      Float32, of mean 0 and variance 1 over the batch; all 0 where all scores are equal.

    Reference: Hu et al. 2025, https://arxiv.org/abs/2501.03262 (v9), "Global Advantage Normalization".
    """
    if scores.size < 2:
        raise Mistake("a batch of one response has no baseline; draw 2 or more")
    apart = scores.astype(jnp.float32) - scores[0, 0]  # equal scores are exactly 0, as in `group_advantages`
    return (apart - jnp.mean(apart)) / (jnp.std(apart, ddof=1) + eps)


def decoupled_advantages(
    scores: Float[Array, "K N G"], weights: Float[Array, "K"], *, eps: float = 1e-4
) -> Float[Array, "N G"]:
    """Σ_k w_k A_k, divided by its std over the batch, with A_k the group advantages of the k-th reward alone.

    A response that earns two rewards while its neighbours earn none has a larger advantage than one that earns a
    single reward; advantages of the sum, divided by the sum's own std, are the same for both. A reward counts by its
    weight, not by its scale.

    Args:
      scores: K scores of each of G responses to each of N prompts.
      weights: weights of the K rewards.
      eps: added to each std.

    Reference: Liu et al. 2026 (GDPO), https://arxiv.org/abs/2601.05242.
    """
    advantages = jnp.stack([group_advantages(of_reward, eps=eps) for of_reward in scores])
    total = times("k,kng->ng", weights.astype(jnp.float32), advantages)
    return total / (jnp.std(total, ddof=1) + eps)  # its mean is 0 in every group


def leave_one_out(scores: Float[Array, "N G"]) -> Float[Array, "N G"]:
    """s_i minus the mean of the other G - 1 scores of the prompt: RLOO's advantage, G/(G - 1) of the centred score.

    Reference: Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740, section 3.
    """
    count = scores.shape[1]
    return group_advantages(scores, scale="none") * (count / (count - 1))
