"""KL(policy‖reference): exact for each token over the whole vocabulary, or estimated from sampled tokens."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from jaxalign.kernels import kl as kernel
from jaxalign.mistake import Mistake
from jaxalign.ops.mesh import kernel_target, row_axes
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
    mesh: Mesh | None = None,
    rows: tuple[str, ...] = ("data", "fsdp"),
    vocabulary: str = "tensor",
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
      implementation: "reference" computes all logits at once; "chunked" one tile of each at a time; "pallas" keeps the
        tiles on the chip and skips other positions, forward and for dz; None is "chunked".
      vocabulary_chunk: columns of a tile, or of a slab of the kernel's backward.
      mesh: the mesh of the arrays, which only "pallas" reads; XLA partitions the others.
      rows: the mesh axes that cut the first axis of hidden.
      vocabulary: the mesh axis that cuts V, if it divides V. The other axes of a weight are gathered.

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
    elif implementation == "pallas":
        options = {"temperature": temperature, "chunk": vocabulary_chunk, "target": kernel_target(mesh)}
        run = functools.partial(_kernel, **options)
        if mesh is not None:
            run = _on_mesh(run, mesh, rows, vocabulary, unembedding, ref_unembedding, flat.shape[0])
        value = run(flat, unembedding, ref_flat, ref_unembedding, flat_mask)
    else:
        everything = jnp.asarray(flat_mask.size, jnp.int32)
        value = kernel.kl(
            flat, unembedding, ref_flat, ref_unembedding, everything, temperature=temperature, chunk=vocabulary_chunk
        )
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


def _kernel(hidden, unembedding, ref_hidden, ref_unembedding, mask, *, axis=None, **options):
    """The kernel on rows in another order: those that count first, so that it skips whole blocks of others."""
    order = jnp.argsort(~mask)  # stable
    count = jnp.sum(mask, dtype=jnp.int32)
    hidden, ref_hidden = (x.at[order].get(unique_indices=True, mode="promise_in_bounds") for x in (hidden, ref_hidden))
    value = kernel.kl(hidden, unembedding, ref_hidden, ref_unembedding, count, axis=axis, **options)
    return jnp.zeros_like(value).at[order].set(value, unique_indices=True, mode="promise_in_bounds")


def _on_mesh(run, mesh, rows, vocabulary, unembedding, ref_unembedding, length):
    """`run` on each device's rows, and on its part of the vocabulary if the mesh divides it."""
    rows = row_axes(mesh, rows, length)
    parts = mesh.shape.get(vocabulary, 1)
    axis = vocabulary if parts > 1 and unembedding.weight.shape[0] % parts == 0 else None
    of_policy, of_reference = (
        Unembedding(P(axis, None), None if u.bias is None else P(axis), u.softcap)
        for u in (unembedding, ref_unembedding)
    )
    return jax.shard_map(
        functools.partial(run, axis=axis),
        mesh=mesh,
        in_specs=(P(rows, None), of_policy, P(rows, None), of_reference, P(rows)),
        out_specs=P(rows),
        check_vma=False,  # a kernel declares no axes over which its outputs vary
    )
