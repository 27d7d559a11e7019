"""The recurrence of generalised advantage estimation, backward in time over rows with holes.

Over the True positions of a row, t₀ < t₁ < ..., with r the rewards, V the critic before the token is chosen:

    δ_k = r_k + γ V_{k+1} - V_k        A_k = δ_k + γλ A_{k+1}        V and A after the last are 0

False positions are skipped: their reward and value are not read (they may be NaN), their advantage is 0, and a
position before them sees the next True position's value and advantage, undiscounted by the gap.

Backward, with g the cotangent of A, forward in time, from μ = 0 before the first:

    μ_k = g_k + γλ μ_{k-1}        dr_k = μ_k        dV_k = γ μ_{k-1} - μ_k

Schulman et al. 2016, https://arxiv.org/abs/1506.02438, eq. 11 and 16.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float

from jaxalign.kernels.runtime import Target, up


class Options(NamedTuple):
    gamma: float
    decay: float  # γλ
    target: Target


def gae_reference(
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    gamma: float,
    gae_lambda: float,
) -> Float[Array, "B T"]:
    """The definition: one step of a scan for each position, from the last to the first."""

    def step(carry, position):
        advantage_next, value_next = carry
        reward, value, real = position
        advantage = reward + gamma * value_next - value + gamma * gae_lambda * advantage_next
        carried = jnp.where(real, advantage, advantage_next), jnp.where(real, value, value_next)
        return carried, jnp.where(real, advantage, 0.0)

    rewards, values = clean(rewards, mask), clean(values, mask)
    zeros = jnp.zeros(rewards.shape[0], jnp.float32)
    _, advantages = jax.lax.scan(step, (zeros, zeros), (rewards.T, values.T, mask.T), reverse=True)
    return advantages.T


def gae(
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    gamma: float,
    gae_lambda: float,
    target: Target,
) -> Float[Array, "B T"]:
    """Advantages in float32, computed by the kernel; γ and λ in [0, 1]."""
    options = Options(gamma, gamma * gae_lambda, target)
    return _gae(options, clean(rewards, mask), clean(values, mask), mask.astype(jnp.float32))


def clean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """x in float32, and 0 where the mask is False, so that no NaN from there reaches a sum or a gradient."""
    return jnp.where(mask, x.astype(jnp.float32), 0.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gae(options, rewards, values, mask):
    return _forward(options, rewards, values, mask)[0]


def _forward(options, rewards, values, mask):
    if options.target.body == "tpu":
        (advantages,) = _tpu_call(_tpu_forward_body, options, [rewards, values, mask], outputs=1, backward_in_time=True)
    else:
        (advantages,) = _gpu_call(_gpu_forward_body, options, [rewards, values, mask], outputs=1)
    return advantages, mask


def _backward(options, mask, cotangent):
    if options.target.body == "tpu":
        d_rewards, d_values = _tpu_call(
            _tpu_backward_body, options, [cotangent, mask], outputs=2, backward_in_time=False
        )
    else:
        d_rewards, d_values = _gpu_call(_gpu_backward_body, options, [cotangent, mask], outputs=2)
    return d_rewards, d_values, jnp.zeros_like(mask)


_gae.defvjp(_forward, _backward)


# TPU: time along sublanes, rows along lanes, so that a step of the recurrence is one vector operation for 128 rows.
#
# In VMEM: three inputs and one output, or two and two, of [512, 512] float32 at most, twice for the pipeline: 8 MiB;
# and the carry [1, 512] twice. Time is the inner axis of the grid, its blocks taken in the recurrence's direction.


def _tpu_call(body, options, arrays, *, outputs, backward_in_time):
    rows, length = arrays[0].shape
    times, lanes = min(512, up(length, 8)), min(512, up(rows, 128))
    blocks = pl.cdiv(length, times)
    block = pl.BlockSpec((times, lanes), lambda i, j: (blocks - 1 - j if backward_in_time else j, i))
    out = pl.pallas_call(
        functools.partial(body, options, length),
        out_shape=[jax.ShapeDtypeStruct((length, rows), jnp.float32)] * outputs,
        grid=(pl.cdiv(rows, lanes), blocks),
        in_specs=[block] * len(arrays),
        out_specs=[block] * outputs,
        scratch_shapes=[pltpu.VMEM((1, lanes), jnp.float32)] * 2,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=options.target.interpret,
    )(*(x.T for x in arrays))
    return [x.T for x in out]


def _tpu_forward_body(options, length, rewards, values, mask, out, advantage_next, value_next):
    times = out.shape[0]
    start = (pl.num_programs(1) - 1 - pl.program_id(1)) * times

    @pl.when(pl.program_id(1) == 0)
    def _():
        advantage_next[...] = jnp.zeros_like(advantage_next)
        value_next[...] = jnp.zeros_like(value_next)

    def step(k, carry):
        after, value_after = carry
        now = pl.ds(times - 1 - k, 1)
        real = (mask[now, :] > 0) & (start + times - 1 - k < length)
        value = values[now, :]
        advantage = rewards[now, :] + options.gamma * value_after - value + options.decay * after
        out[now, :] = jnp.where(real, advantage, 0.0)
        return jnp.where(real, advantage, after), jnp.where(real, value, value_after)

    carry = jax.lax.fori_loop(0, times, step, (advantage_next[...], value_next[...]))
    advantage_next[...], value_next[...] = carry


def _tpu_backward_body(options, length, cotangent, mask, d_rewards, d_values, before, _):
    times = d_rewards.shape[0]
    start = pl.program_id(1) * times

    @pl.when(pl.program_id(1) == 0)
    def _():
        before[...] = jnp.zeros_like(before)

    def step(k, last):
        now = pl.ds(k, 1)
        real = (mask[now, :] > 0) & (start + k < length)
        adjoint = cotangent[now, :] + options.decay * last
        d_rewards[now, :] = jnp.where(real, adjoint, 0.0)
        d_values[now, :] = jnp.where(real, options.gamma * last - adjoint, 0.0)
        return jnp.where(real, adjoint, last)

    before[...] = jax.lax.fori_loop(0, times, step, before[...])


# GPU (Triton): a program walks along one row in tiles of 64. Within a tile the recurrence is solved at once: with c the
# number of True positions so far, position s enters position t with the weight (γλ)^|c_s - c_t|, a 64 x 64 triangle in
# registers. A step a position would wait for memory at every position.

TILE = 64


def _gpu_call(body, options, arrays, *, outputs):
    rows, length = arrays[0].shape
    return pl.pallas_call(
        functools.partial(body, options),
        out_shape=[jax.ShapeDtypeStruct((rows, length), jnp.float32)] * outputs,
        grid=(rows,),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=options.target.interpret,
    )(*arrays)


class _Tile(NamedTuple):
    """TILE positions t of a row; matrices [t s] relate position t to position s."""

    at: tuple  # their index in an array [B T]
    inside: jax.Array  # True up to T
    real: jax.Array  # mask
    count: jax.Array  # c_t = Σ_{s <= t} mask_s
    total: jax.Array  # c of the last
    steps: jax.Array  # c_s - c_t
    later: jax.Array  # s >= t

    def load(self, ref):
        return plgpu.load(ref.at[self.at], mask=self.inside, other=0.0)

    def store(self, ref, x):
        plgpu.store(ref.at[self.at], x, mask=self.inside)

    def pick(self, match, x):
        """For each t the x of the True position s where `match` [t s]; 0 if there is none."""
        return jnp.sum(jnp.where(match & (self.real > 0)[None, :], x[None, :], 0.0), axis=1)


def _tile(mask, row, start) -> _Tile:
    t = jnp.arange(TILE)
    at, inside = (row, pl.ds(start, TILE)), start + t < mask.shape[1]
    real = plgpu.load(mask.at[at], mask=inside, other=0.0)
    later = t[None, :] >= t[:, None]
    count = jnp.sum(jnp.where(t[None, :] <= t[:, None], real[None, :], 0.0), axis=1)
    return _Tile(at, inside, real, count, jnp.sum(real), count[None, :] - count[:, None], later)


def _power(decay: float, steps: jax.Array) -> jax.Array:
    return jnp.exp(steps * math.log(decay)) if decay > 0 else jnp.where(steps == 0, 1.0, 0.0)


def _gpu_forward_body(options, rewards, values, mask, out):
    row, tiles = pl.program_id(0), pl.cdiv(mask.shape[1], TILE)

    def solve(k, carry):
        after, value_after = carry
        tile = _tile(mask, row, (tiles - 1 - k) * TILE)
        reward, value = tile.load(rewards), tile.load(values)
        last = tile.count == tile.total
        next_value = tile.pick(tile.steps == 1, value) + jnp.where(last, value_after, 0.0)
        delta = jnp.where(tile.real > 0, reward + options.gamma * next_value - value, 0.0)
        weight = jnp.where(tile.later, _power(options.decay, jnp.maximum(tile.steps, 0.0)), 0.0)
        advantage = jnp.sum(weight * delta[None, :], axis=1)
        advantage += _power(options.decay, tile.total - tile.count + 1.0) * after
        tile.store(out, jnp.where(tile.real > 0, advantage, 0.0))
        first = (tile.real > 0) & (tile.count == 1)

        def at_first(x, otherwise):
            return jnp.where(tile.total > 0, jnp.sum(jnp.where(first, x, 0.0)), otherwise)

        return at_first(advantage, after), at_first(value, value_after)

    jax.lax.fori_loop(0, tiles, solve, (jnp.float32(0.0), jnp.float32(0.0)))


def _gpu_backward_body(options, cotangent, mask, d_rewards, d_values):
    row = pl.program_id(0)

    def solve(k, before):
        tile = _tile(mask, row, k * TILE)
        g = jnp.where(tile.real > 0, tile.load(cotangent), 0.0)
        earlier = jnp.arange(TILE)[None, :] <= jnp.arange(TILE)[:, None]
        weight = jnp.where(earlier, _power(options.decay, jnp.maximum(-tile.steps, 0.0)), 0.0)
        adjoint = jnp.sum(weight * g[None, :], axis=1) + _power(options.decay, tile.count) * before
        last = tile.pick(tile.steps == -1, adjoint) + jnp.where(tile.count == 1, before, 0.0)
        tile.store(d_rewards, jnp.where(tile.real > 0, adjoint, 0.0))
        tile.store(d_values, jnp.where(tile.real > 0, options.gamma * last - adjoint, 0.0))
        final = (tile.real > 0) & (tile.count == tile.total)
        return jnp.where(tile.total > 0, jnp.sum(jnp.where(final, adjoint, 0.0)), before)

    jax.lax.fori_loop(0, pl.cdiv(mask.shape[1], TILE), solve, jnp.float32(0.0))
