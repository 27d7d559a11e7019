"""Log-probabilities of chosen tokens, and statistics of their distributions, from hidden states.

The logits are z = softcap(h Wᵀ + b) / temperature, computed in float32, tile by tile, and never stored as a whole.
"""

from __future__ import annotations

import functools
import logging
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxalign.kernels import logprob, runtime
from jaxalign.mistake import Mistake
from jaxalign.ops import logprobs_chunked, logprobs_sharded
from jaxalign.ops.logprobs_chunked import Chunked
from jaxalign.ops.logprobs_sharded import Kernel
from jaxalign.ops.mesh import Shards
from jaxalign.types import Unembedding

log = logging.getLogger(__name__)

IMPLEMENTATIONS = ("reference", "chunked", "pallas")


class TokenLogps(NamedTuple):
    """One value per target, in nats and float32; None if not requested; 0 (False) where the mask is False."""

    logps: jax.Array  # log p(target) = z_target - log Σ exp z
    entropy: jax.Array | None = None  # -Σ p log p
    log_normalizer: jax.Array | None = None  # log Σ exp z
    mean_logit: jax.Array | None = None  # Σ z / V
    correct: jax.Array | None = None  # the target is the most likely token, of equal ones that with the lowest id


def token_logps(
    hidden: Float[Array, "*batch D"],
    unembedding: Unembedding,
    targets: Int[Array, "*batch"],
    *,
    mask: Bool[Array, "*batch"] | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    log_normalizer: bool = False,
    mean_logit: bool = False,
    correct: bool = False,
    implementation: str | None = None,
    vocabulary_chunk: int | None = None,
    shards: Shards | None = None,
) -> TokenLogps:
    """log p(target | hidden) for each position, without a shift, and the requested extras.

    Args:
      hidden: final hidden states, in the dtype of compute.
      unembedding: weight [V D], bias, soft-cap.
      targets: ids in [0, V).
      mask: positions that count. Elsewhere values and gradients are 0, and hidden may be anything.
      temperature: divisor of the logits.
      entropy: also return the entropy.
      log_normalizer: also return log Σ exp z.
      mean_logit: also return the mean of z over the vocabulary.
      correct: also return target == argmax z.
      implementation: "reference" computes all logits at once; "chunked" one tile of [tokens, vocabulary_chunk] at a
        time, forward and backward, and skips most other tokens; "pallas" is one kernel over the vocabulary, which
        skips them as well (on a CPU it is interpreted, for tests); None is "chunked", until the
        kernel has been measured to be faster on a device.
      vocabulary_chunk: columns of a tile; by default a tile has about 4M logits, 16 MiB.
      shards: the mesh of the program, whose devices each take their own tokens and share of the vocabulary. None: one
        device, or "reference", which XLA partitions.

    Returns:
      TokenLogps. For zero logits, logps is -log V and the entropy is log V.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise Mistake(f"implementation={implementation!r} is not one of 'reference', 'chunked', 'pallas', None")
    if temperature <= 0:
        raise Mistake(f"temperature={temperature} must be positive; greedy choices have no log-probability")
    shape = targets.shape
    flat_mask = jnp.ones(targets.size, bool) if mask is None else mask.reshape(-1)
    flat_hidden = hidden.reshape(-1, hidden.shape[-1])
    flat_hidden = jnp.where(flat_mask[:, None], flat_hidden, jnp.zeros((), hidden.dtype))
    extras = {"entropy": entropy, "log_normalizer": log_normalizer, "mean_logit": mean_logit, "correct": correct}
    wanted = tuple(name for name, requested in extras.items() if requested)
    weight, bias, softcap = unembedding.weight, unembedding.bias, unembedding.softcap
    arguments = flat_hidden, weight, bias, targets.reshape(-1), flat_mask
    kernel = _kernel(targets.size, weight.shape, hidden.dtype, shards) if implementation == "pallas" else None
    if implementation == "reference":
        values = logprob.reference(*arguments[:-1], softcap=softcap, temperature=temperature)
    elif kernel is not None:
        options = logprob.Options(softcap, temperature, entropy, mean_logit, correct)
        if shards is None:
            values = logprob.token_logps(options, kernel, *arguments)
        else:
            values = logprobs_sharded.token_logps(Kernel(options, kernel), shards, *arguments)
    else:
        local = shards is not None and shards.local(targets.size, weight.shape[0]) is not None
        # XLA would take tokens from device to device where it partitions the computation by itself
        skips = mask is not None and (local or shards is None)
        body = Chunked(softcap, temperature, wanted, vocabulary_chunk, skips)
        if local:
            values = logprobs_sharded.token_logps(body, shards, *arguments)
        else:
            values = logprobs_chunked.token_logps(body, *arguments)
    requested = {name: values[name] for name in ("logps", *wanted)}
    return TokenLogps(
        **{name: jnp.where(flat_mask, x, jnp.zeros((), x.dtype)).reshape(shape) for name, x in requested.items()}
    )


def next_token_logps(
    hidden: Float[Array, "B T D"],
    unembedding: Unembedding,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"] | None = None,
    **options: object,
) -> TokenLogps:
    """`token_logps` with the shift of language models: x[:, t] is about tokens[:, t] given tokens[:, :t]; x[:, 0] = 0.

    hidden[:, t - 1] predicts tokens[:, t]. A row may hold several sequences; `mask` is False on their first tokens,
    which nothing in the row predicts. Takes the options of `token_logps`.
    """
    mask = jnp.ones(tokens.shape, bool) if mask is None else mask
    # The targets are shifted, not the wide hidden states; the last position, which wraps around, is masked.
    targets, mask = jnp.roll(tokens, -1, axis=1), jnp.roll(mask, -1, axis=1).at[:, -1].set(False)
    values = token_logps(hidden, unembedding, targets, mask=mask, **options)
    return TokenLogps(*(None if x is None else jnp.roll(x, 1, axis=1) for x in values))


def _kernel(tokens: int, weight: tuple[int, ...], dtype: jnp.dtype, shards: Shards | None) -> runtime.Target | None:
    """The target of the kernel; None if it has no tiles for the shape."""
    target = runtime.target_of(None if shards is None else list(shards.mesh.devices.flat))
    if target.body == "cpu":
        target = runtime.interpreted()
    vocabulary, width = weight
    local = (tokens, vocabulary) if shards is None else shards.local(tokens, vocabulary)
    if local is None or not logprob.supports(*local, width, dtype.itemsize, target):
        _warn_once(
            f"no log-probability kernel for {tokens} tokens, {vocabulary} x {width} weights in {dtype}: in chunks"
        )
        return None
    return target


@functools.cache
def _warn_once(message: str) -> None:
    log.warning(message)
