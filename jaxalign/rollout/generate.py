"""A plain sampler with a key-value cache: read the prompts once, then a token at a time until every row has ended."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxalign.models.cache import Cache, empty_cache
from jaxalign.ops.sampling import sample
from jaxalign.types import PyTree, Unembedding

PROMPT_BUCKET = 32  # prompts are padded to a multiple of it, so that few programs are compiled


class Sampling(NamedTuple):
    """How responses are drawn; hashable."""

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    terminators: tuple[int, ...] = ()


class Generated(NamedTuple):
    """Responses, on the right of the prompts that they continue."""

    tokens: jax.Array  # Int32[B R]
    mask: jax.Array  # Bool[B R], True on the response, its terminator included
    logps: jax.Array  # Float32[B R], under the distribution that the tokens were drawn from; 0 off the mask
    finished: jax.Array  # Bool[B], the response ended with a terminator


@functools.partial(jax.jit, static_argnames=("graphdef", "sampling"))
def generate(
    graphdef: Any,
    params: PyTree,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    rows: jax.Array,
    key: jax.Array,
    *,
    sampling: Sampling,
) -> Generated:
    """Draws a response to each prompt.

    Args:
      graphdef: of a decoder.
      params: its parameters.
      prompts: Int32[B P], padded on the left.
      prompt_mask: Bool[B P], False on padding.
      rows: Int32[B], numbers of the rows. Row r draws its token i with a key made of `key`, r and i: the same whatever
        else is in the batch, and again after a resume.
      key: typed key.
      sampling: limits, temperature and terminators.
    """
    model = nnx.merge(graphdef, params)
    batch, width = prompts.shape
    cache = empty_cache(model.config, batch, width + sampling.max_new_tokens, model.compute.dtype)
    segments = prompt_mask.astype(jnp.int32)
    positions = jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)
    hidden, cache = model(prompts, positions=positions, segment_ids=segments, cache=cache)
    row_keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)
    terminators = jnp.array(sampling.terminators, jnp.int32)

    def draw(state: _State) -> _State:
        keys = jax.vmap(lambda k: jax.random.fold_in(k, state.step))(row_keys)
        logits = _logits(state.hidden, model.unembed())
        options = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
        tokens, logps = sample(keys, logits, **options)
        alive = ~state.done
        tokens, logps = jnp.where(alive, tokens, 0).astype(jnp.int32), jnp.where(alive, logps, 0.0)
        ended = alive & jnp.any(tokens[:, None] == terminators[None, :], axis=1)
        hidden, cache = model(
            tokens[:, None],
            positions=(positions[:, -1] + 1 + state.step)[:, None],
            segment_ids=alive.astype(jnp.int32)[:, None],
            cache=state.cache,
        )
        put = lambda held, new: jax.lax.dynamic_update_slice(held, new[:, None], (0, state.step))  # noqa: E731
        return _State(
            state.step + 1,
            put(state.tokens, tokens),
            put(state.mask, alive),
            put(state.logps, logps),
            state.done | ended,
            hidden[:, -1],
            cache,
        )

    shape = batch, sampling.max_new_tokens
    start = _State(
        jnp.int32(0),
        jnp.zeros(shape, jnp.int32),
        jnp.zeros(shape, bool),
        jnp.zeros(shape, jnp.float32),
        ~jnp.any(prompt_mask, axis=1),  # an empty prompt fills up a batch
        hidden[:, -1],
        cache,
    )
    more = lambda state: (state.step < sampling.max_new_tokens) & ~jnp.all(state.done)  # noqa: E731
    end = jax.lax.while_loop(more, draw, start)
    return Generated(end.tokens, end.mask, end.logps, end.done)


class _State(NamedTuple):
    step: jax.Array
    tokens: jax.Array
    mask: jax.Array
    logps: jax.Array
    done: jax.Array
    hidden: jax.Array  # [B D], what the next token is drawn from
    cache: Cache


def _logits(hidden: jax.Array, unembedding: Unembedding) -> jax.Array:
    """Float32[B V] of one position; a sampler needs them all."""
    weight = unembedding.weight.astype(hidden.dtype)
    logits = jnp.einsum("bd,vd->bv", hidden, weight, preferred_element_type=jnp.float32)
    if unembedding.bias is not None:
        logits = logits + unembedding.bias.astype(jnp.float32)[None, :]
    cap = unembedding.softcap
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def generate_ids(
    graphdef: Any,
    params: PyTree,
    prompts: Sequence[Sequence[int]],
    key: jax.Array,
    *,
    sampling: Sampling,
    batch_size: int = 16,
) -> list[tuple[list[int], bool]]:
    """(response ids without the terminator, whether it ended with one) for each prompt, in the order given.

    Prompts of alike length go together, so little is spent on padding.
    """
    responses: list[tuple[list[int], bool]] = [([], False)] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for at in range(0, len(order), batch_size):
        chunk = order[at : at + batch_size]
        tokens, mask = _left_padded([prompts[i] for i in chunk], batch_size)
        rows = np.array([*chunk, *range(len(prompts), len(prompts) + batch_size - len(chunk))], np.int32)
        out = jax.device_get(generate(graphdef, params, tokens, mask, rows, key, sampling=sampling))
        for b, i in enumerate(chunk):
            ids = out.tokens[b][out.mask[b]].tolist()
            ended = bool(ids) and ids[-1] in sampling.terminators
            responses[i] = (ids[:-1] if ended else ids, ended)
    return responses


def _left_padded(prompts: Sequence[Sequence[int]], batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    longest = max(len(prompt) for prompt in prompts)
    width = -(-longest // PROMPT_BUCKET) * PROMPT_BUCKET
    tokens, mask = np.zeros((batch_size, width), np.int32), np.zeros((batch_size, width), bool)
    for b, prompt in enumerate(prompts):
        if len(prompt):
            tokens[b, width - len(prompt) :], mask[b, width - len(prompt) :] = prompt, True
    return tokens, mask
