"""KL(policy‖reference): exact for each token over the whole vocabulary, or estimated from sampled tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from jaxalign.kernels import kl as kernel
from jaxalign.mistake import Mistake
from jaxalign.ops.mesh import Shards, kernel_target, row_axes
from jaxalign.types import Unembedding

IMPLEMENTATIONS = ("reference", "chunked", "pallas")


def k1(log_ratio: Float[Array, "*tokens"]) -> Float[Array, "*tokens"]:
    """log π/π_ref: unbiased for KL(π‖π_ref) over tokens drawn from π, of either sign. Its gradient is biased.

    Its gradient ∇ log π has expectation 0, unlike that of the KL: as a loss it does nothing.

    Args:
      log_ratio: log π - log π_ref of tokens that π drew, in nats.

    Reference: Schulman 2020, http://joschu.net/blog/kl-approx.html, where r = π_ref/π = exp(-log_ratio).
    """
    return log_ratio


def k2(log_ratio: Float[Array, "*tokens"]) -> Float[Array, "*tokens"]:
    """log_ratio² / 2: biased for KL(π‖π_ref), never negative. Its gradient, log_ratio ∇ log π, is unbiased.

    Args:
      log_ratio: log π - log π_ref of tokens that π drew, in nats.

    Reference: Schulman 2020, http://joschu.net/blog/kl-approx.html.
    """
    return 0.5 * log_ratio**2


def k3(log_ratio: Float[Array, "*tokens"]) -> Float[Array, "*tokens"]:
    """r - 1 - log r with r = π_ref/π: unbiased for KL(π‖π_ref), never negative, 0 only where both agree.

    exp(-log_ratio) - 1 + log_ratio. Its gradient, (1 - r) ∇ log π, has the expectation of the gradient of KL(π_ref‖π).

    Args:
      log_ratio: log π - log π_ref of tokens that π drew, in nats.

    Reference: Schulman 2020, http://joschu.net/blog/kl-approx.html.
    """
    # expm1 keeps it accurate near 0, where training spends its time
    return jnp.expm1(-log_ratio) + log_ratio


KL_ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


def token_kl(
    hidden: Float[Array, "*batch D"],
    unembedding: Unembedding,
    ref_hidden: Float[Array, "*batch R"],
    ref_unembedding: Unembedding,
    *,
    mask: Bool[Array, "*batch"] | None = None,
    temperature: float = 1.0,
    implementation: str | None = None,
    vocabulary_chunk: int | None = None,
    shards: Shards | None = None,
) -> Float[Array, "*batch"]:
    """KL(π‖π_ref) = Σ_v π(v) log π(v)/π_ref(v) of each position's next token, exact, with its gradient to the policy.

    The reference has no gradient. hidden[:, t] predicts tokens[:, t + 1]; there is no shift.

    Args:
      hidden: the policy's final hidden states, in the dtype of compute.
      unembedding: the policy's weight [V D], bias, soft-cap.
      ref_hidden: the reference's hidden states; R may differ from D.
      ref_unembedding: the reference's unembedding, with the same V.
      mask: positions that count. Elsewhere the KL and all gradients are 0, and hidden states may be anything.
      temperature: divisor of both logits.
      implementation: "reference" computes all logits at once; "chunked" one tile of each at a time, and skips most
        other positions; "pallas" keeps the tiles on the chip and skips them as well; None is "chunked".
      vocabulary_chunk: columns of a tile, or of a slab of the kernel's backward.
      shards: the mesh of the program, whose devices each take their own tokens and share of the vocabulary. None: one
        device, or "reference", which XLA partitions.

    Returns:
      Nats, float32, never negative; 0 where both distributions agree.

    Raises:
      Mistake: an unknown implementation, temperature <= 0, vocabularies that differ, or rows that the mesh does not
        divide.
    """
    _check(implementation, temperature, unembedding, ref_unembedding)
    shape = hidden.shape[:-1]
    flat_mask = jnp.ones(shape, bool).reshape(-1) if mask is None else mask.reshape(-1)
    flat, ref_flat = _masked_rows(hidden, flat_mask), _masked_rows(ref_hidden, flat_mask)
    if implementation == "reference":
        logits = _logits(flat, unembedding, temperature)
        value = kernel.kl_reference(logits, _logits(ref_flat, ref_unembedding, temperature))
    else:
        target = kernel_target(None if shards is None else shards.mesh) if implementation == "pallas" else kernel.XLA
        caps = unembedding.softcap, ref_unembedding.softcap
        options = kernel.Options(*caps, temperature, vocabulary_chunk, target, None)
        parts = _dividing(shards, flat.shape[0], implementation)
        if shards is not None and parts is None:  # XLA would take tokens from device to device to put some first
            chunk, everything = vocabulary_chunk, jnp.asarray(flat.shape[0], jnp.int32)
            arguments = flat, unembedding, ref_flat, ref_unembedding, everything
            value = kernel.kl(*arguments, temperature=temperature, chunk=chunk)
        else:
            sides = flat, unembedding.weight, unembedding.bias, ref_flat, ref_unembedding.weight, ref_unembedding.bias
            value = _exact(options, parts, *sides, flat_mask)
    return jnp.where(flat_mask, value, 0.0).reshape(shape)


def token_kl_of_logits(
    logits: Float[Array, "*batch V"],
    ref_logits: Float[Array, "*batch V"],
    *,
    mask: Bool[Array, "*batch"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "*batch"]:
    """`token_kl` of given logits, as a sampler or a judge has them; a train step has none."""
    if implementation not in (None, *IMPLEMENTATIONS):
        raise Mistake(f"implementation={implementation!r} is not one of {IMPLEMENTATIONS}, None")
    flat_mask = jnp.ones(logits.shape[:-1], bool).reshape(-1) if mask is None else mask.reshape(-1)
    flat, ref_flat = _masked_rows(logits, flat_mask), _masked_rows(ref_logits, flat_mask)
    if implementation == "reference":
        value = kernel.kl_reference(flat, ref_flat)
    else:
        target = kernel_target(None) if implementation == "pallas" else kernel.XLA
        value = kernel.kl_of_logits(flat, ref_flat, target=target)
    return jnp.where(flat_mask, value, 0.0).reshape(logits.shape[:-1])


def _masked_rows(x: jax.Array, mask: jax.Array) -> jax.Array:
    """[*batch D] -> [N D], 0 in the rows where the mask [N] is False."""
    return jnp.where(mask[:, None], x.reshape(-1, x.shape[-1]), jnp.zeros((), x.dtype))


def _check(implementation: str | None, temperature: float, unembedding: Unembedding, ref: Unembedding) -> None:
    if implementation not in (None, *IMPLEMENTATIONS):
        raise Mistake(f"implementation={implementation!r} is not one of {IMPLEMENTATIONS}, None")
    if temperature <= 0:
        raise Mistake(f"temperature={temperature} must be positive; greedy choices have no distribution to compare")
    sizes = unembedding.weight.shape[0], ref.weight.shape[0]
    if sizes[0] != sizes[1]:
        raise Mistake(
            f"the policy's vocabulary has {sizes[0]} tokens and the reference's {sizes[1]}; their KL needs one "
            "tokenizer, and weights cut to the same rows"
        )


def _logits(hidden: jax.Array, unembedding: Unembedding, temperature: float) -> jax.Array:
    weight, bias = unembedding.weight, unembedding.bias
    raw = kernel.times("nd,vd->nv", hidden, weight.astype(hidden.dtype))
    raw = raw if bias is None else raw + bias.astype(jnp.float32)[None, :]
    return kernel.squash(raw, unembedding.softcap, temperature)[0]


def _dividing(shards: Shards | None, tokens: int, implementation: str | None) -> Shards | None:
    """The shards if they divide the tokens. Otherwise XLA partitions the chunks, which it cannot do with a kernel."""
    if shards is not None and implementation == "pallas":
        row_axes(shards.mesh, shards.rows, tokens)
    return None if shards is None or shards.local(tokens, 1) is None else shards


# custom_vjp is around the map over devices, not inside it: forward and backward each write out their own sums.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _exact(options, shards, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, mask):
    return _forward(options, shards, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, mask)[0]


def _forward(options, shards, *inputs):
    def local(*inputs, axis=None):
        *sides, mask = inputs
        move, back = _counting_first(mask)
        sides[0], sides[3] = move(sides[0]), move(sides[3])
        return jax.tree.map(back, kernel.forward(options._replace(axis=axis), tuple(sides), jnp.sum(mask)))

    if shards is None:
        values = local(*inputs)
    else:
        axis = shards.axis(inputs[1].shape[0])
        mapped = functools.partial(local, axis=axis)
        specs = {"in_specs": _specs(shards, axis), "out_specs": P(shards.rows)}
        values = jax.shard_map(mapped, mesh=shards.mesh, **specs, check_vma=False)(*_narrow(inputs))
    return values[0], (inputs, values)


def _backward(options, shards, residuals, cotangent):
    inputs, values = residuals
    weight, bias = inputs[1:3]
    place = None if shards is None else shards.of_weight(weight.shape)

    def local(values, cotangent, *inputs, axis=None, weight_dtype=jnp.float32):
        *sides, mask = inputs
        move, back = _counting_first(mask)
        sides[0], sides[3] = move(sides[0]), move(sides[3])
        rows = jax.tree.map(move, (values, cotangent))
        d_hidden, d_weight, d_bias = kernel.backward(
            options._replace(axis=axis), tuple(sides), jnp.sum(mask), *rows, weight_dtype=weight_dtype
        )
        d_hidden = back(d_hidden)
        if axis is not None:
            d_hidden = jax.lax.psum(d_hidden.astype(jnp.float32), axis).astype(d_hidden.dtype)
        if shards is not None:
            d_weight = shards.summed(d_weight, place)
            d_bias = None if d_bias is None else jax.lax.psum(d_bias, shards.rows)
        return d_hidden, d_weight, d_bias

    if shards is None:
        gradients = local(values, cotangent, *inputs, weight_dtype=weight.dtype)
    else:
        axis = shards.axis(weight.shape[0])
        rows, mapped = P(shards.rows), functools.partial(local, axis=axis)
        specs = {"in_specs": (rows, rows, *_specs(shards, axis)), "out_specs": (P(shards.rows, None), place, P(axis))}
        gradients = jax.shard_map(mapped, mesh=shards.mesh, **specs, check_vma=False)(
            values, cotangent, *_narrow(inputs)
        )
    d_hidden, d_weight, d_bias = gradients
    d_bias = None if bias is None else d_bias.astype(bias.dtype)
    return d_hidden, d_weight.astype(weight.dtype), d_bias, None, None, None, None


_exact.defvjp(_forward, _backward)


def _counting_first(mask: jax.Array) -> tuple[Callable, Callable]:
    """(rows in the order that puts those of the mask first, the order of before)."""
    order = jnp.argsort(~mask, stable=True)
    options = {"unique_indices": True, "mode": "promise_in_bounds"}
    return (
        lambda x: x.at[order].get(**options),
        lambda x: jnp.zeros_like(x).at[order].set(x, **options),
    )


def _narrow(inputs: tuple) -> tuple:
    """The inputs with weights in the dtype of compute, in which they are gathered."""
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias, mask = inputs
    return hidden, weight.astype(hidden.dtype), bias, ref_hidden, ref_weight.astype(ref_hidden.dtype), ref_bias, mask


def _specs(shards: Shards, axis: str | None) -> tuple[P, ...]:
    side = P(shards.rows, None), P(axis, None), P(axis)
    return *side, *side, P(shards.rows)
