"""The device's side of generation: slots that each hold one request, a token more of each per step.

Every slot has room for one prompt, padded on the left, and behind it a ring of R tokens that all slots fill at one
common place, clock mod R. What a slot's place holds is told by positions and segment ids, so a slot can be given the
next request at any time, and a token is written by one slice whatever the slots' ages. A ring starts short, and all
stop before one of R tokens would run into itself, until `grow` has made them longer: so memory and reading follow the
responses that come, not those that may.

Axis letters: B slots, P prompt, R response, V vocabulary, D model width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxalign.models.decoder.cache import Cache, empty_cache
from jaxalign.models.places import Layout
from jaxalign.ops.sampling import Drawn, sample
from jaxalign.rollout.engine.params import Weights
from jaxalign.types import PyTree, Unembedding


class Sampling(NamedTuple):
    """How responses are drawn; hashable. The order: penalty, bans, temperature, top-k, top-p, min-p."""

    max_new_tokens: int = 128
    temperature: float = 1.0  # 0: the most likely token
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # for tokens of the prompt and of the response so far
    terminators: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()  # texts that end a response, which holds them; the engine looks for them
    bad_words: tuple[tuple[int, ...], ...] = ()  # sequences of ids that are never completed

    @classmethod
    def of(cls, config: Any, terminators: Sequence[int] = (), stop: Sequence[str] = ()) -> Sampling:
        """The sampling settings of a command's config; one that the config lacks keeps its default."""
        names = "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"
        settings = {name: getattr(config, name) for name in names if hasattr(config, name)}
        return cls(**settings, terminators=tuple(terminators), stop=tuple(stop))

    @property
    def truncates(self) -> bool:
        """Tokens are drawn from another distribution than softmax(logits / temperature)."""
        return (
            bool(self.top_k or self.bad_words)
            or self.top_p < 1
            or self.min_p > 0
            or self.repetition_penalty != 1
            or self.temperature == 0
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """State of the engine between two calls."""

    cache: Cache
    hidden: jax.Array  # [B D], what the next token is drawn from
    keys: jax.Array  # typed keys [B], one a request
    position: jax.Array  # Int32[B], of the next token
    count: jax.Array  # Int32[B], tokens drawn
    limit: jax.Array  # Int32[B], of tokens to draw
    alive: jax.Array  # Bool[B]
    start: jax.Array  # Int32[B], the clock when the request came
    clock: jax.Array  # Int32[], steps since the engine began
    tokens: jax.Array  # Int32[B R], in the ring's order
    logps: jax.Array  # Float32[B R]
    model_logps: jax.Array  # Float32[B R]
    seen: jax.Array  # Bool[B V], or [B 0] where no penalty is asked for
    recent: jax.Array  # Int32[B W], the last tokens, as many as the longest bad word has before its last; -1: none


class Admitted(NamedTuple):
    """Requests for free slots. Several slots may take one prompt; a slot number of B stands for nobody."""

    prompts: jax.Array  # Int32[F P], padded on the left
    mask: jax.Array  # Bool[F P]
    slot: jax.Array  # Int32[A], which slot
    source: jax.Array  # Int32[A], which prompt it continues
    keys: jax.Array  # typed keys [A]
    limit: jax.Array  # Int32[A]


@functools.partial(jax.jit, static_argnames=("graphdef", "slots", "prompt", "response", "sampling", "cache_dtype"))
def empty_slots(
    graphdef: Any, params: PyTree, *, slots: int, prompt: int, response: int, sampling: Sampling, cache_dtype: Any
) -> Slots:
    """All slots free; `prompt` is the room of each for a prompt, `response` the length of its ring, in tokens."""
    model = nnx.merge(graphdef, params)
    dtype = model.compute.dtype if cache_dtype is None else cache_dtype
    ring = lambda kind: jnp.zeros((slots, response), kind)  # noqa: E731
    each = lambda kind: jnp.zeros(slots, kind)  # noqa: E731
    width = max((len(word) - 1 for word in sampling.bad_words), default=0)
    return _placed(
        Slots(
            cache=empty_cache(model.config, slots, prompt + response, dtype),
            hidden=jnp.zeros((slots, model.config.hidden_size), model.compute.dtype),
            keys=jax.random.split(jax.random.key(0), slots),
            position=each(jnp.int32),
            count=each(jnp.int32),
            limit=each(jnp.int32),
            alive=each(bool),
            start=each(jnp.int32),
            clock=jnp.int32(0),
            tokens=ring(jnp.int32),
            logps=ring(jnp.float32),
            model_logps=ring(jnp.float32),
            seen=jnp.zeros((slots, model.config.vocab_size if sampling.repetition_penalty != 1 else 0), bool),
            recent=jnp.full((slots, width), -1, jnp.int32),
        ),
        model.compute.layout,
    )


def admit(graphdef: Any, weights: Weights, slots: Slots, new: Admitted) -> Slots:
    """Reads the prompts and gives each to its slots: two programs, so that a ring's length is none of the first's."""
    read = _read(graphdef, weights, new.prompts, new.mask, dtype=slots.cache.layers[0].key.dtype)
    return _seat(graphdef, weights, slots, new, *read)


@functools.partial(jax.jit, static_argnames=("graphdef", "dtype"))
def _read(
    graphdef: Any, weights: Weights, prompts: jax.Array, mask: jax.Array, *, dtype: Any
) -> tuple[jax.Array, Cache]:
    """Each prompt's last hidden state [F D], and a cache of the prompts alone."""
    model = nnx.merge(graphdef, weights.params)
    segments = mask.astype(jnp.int32)
    hidden, cache = model(
        prompts,
        positions=jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0),
        segment_ids=segments,
        cache=empty_cache(model.config, *prompts.shape, dtype),
        layers=model.layers(weights.layers),
    )
    return hidden[:, -1], cache


@functools.partial(jax.jit, static_argnames="graphdef", donate_argnames="slots")
def _seat(graphdef: Any, weights: Weights, slots: Slots, new: Admitted, hidden: jax.Array, read: Cache) -> Slots:
    """The slots with what was read of their prompts."""
    width = new.prompts.shape[1]
    room = slots.cache.positions.shape[1] - slots.tokens.shape[1]

    def put(held: jax.Array, values: jax.Array) -> jax.Array:
        return held.at[new.slot].set(values, mode="drop")

    def put_prompt(held: jax.Array, values: jax.Array) -> jax.Array:
        """Keys or values [F Hk width K], at the end of the prompt's room."""
        return held.at[new.slot, :, room - width : room].set(values[new.source], mode="drop")

    def put_whole(held: jax.Array, values: jax.Array) -> jax.Array:
        """Positions or segments [F width] there, and 0 in the rest of the slot, which empties the ring."""
        return put(held, jnp.pad(values[new.source], ((0, 0), (room - width, held.shape[1] - room))))

    layers = jax.tree.map(put_prompt, slots.cache.layers, read.layers)
    seen, recent = _history(slots, new)
    last = read.positions[:, -1][new.source]
    everyone = lambda value: jnp.full(new.slot.shape, value)  # noqa: E731
    return _placed(
        dataclasses.replace(
            slots,
            cache=dataclasses.replace(
                slots.cache,
                layers=layers,
                positions=put_whole(slots.cache.positions, read.positions),
                segment_ids=put_whole(slots.cache.segment_ids, read.segment_ids),
            ),
            hidden=put(slots.hidden, hidden[new.source]),
            keys=put(slots.keys, new.keys),
            position=put(slots.position, last + 1),
            count=put(slots.count, everyone(0)),
            limit=put(slots.limit, new.limit),
            alive=put(slots.alive, everyone(True)),
            start=put(slots.start, everyone(slots.clock)),
            seen=put(slots.seen, seen),
            recent=put(slots.recent, recent),
        ),
        nnx.merge(graphdef, weights.params).compute.layout,
    )


def _history(slots: Slots, new: Admitted) -> tuple[jax.Array, jax.Array]:
    """`seen` [A V] and `recent` [A W] of the prompts."""
    tokens, mask = new.prompts[new.source], new.mask[new.source]
    vocabulary, width = slots.seen.shape[1], slots.recent.shape[1]
    ids = jnp.where(mask, tokens, vocabulary)  # padding is out of bounds
    rows = jnp.arange(len(ids))[:, None]
    seen = jnp.zeros((len(ids), vocabulary), bool).at[rows, ids].set(True, mode="drop")
    marked = jnp.pad(jnp.where(mask, tokens, -1), ((0, 0), (width, 0)), constant_values=-1)
    return seen, marked[:, marked.shape[1] - width :]


@functools.partial(jax.jit, static_argnames=("graphdef", "sampling"), donate_argnames="slots")
def decode(
    graphdef: Any, weights: Weights, slots: Slots, want_free: jax.Array, most: jax.Array, *, sampling: Sampling
) -> Slots:
    """Draws tokens until `want_free` slots are free, none is alive, a ring is full, or `most` steps were taken."""
    model = nnx.merge(graphdef, weights.params)
    layers = model.layers(weights.layers)
    terminators = jnp.array(sampling.terminators, jnp.int32)
    end = slots.clock + most

    def more(slots: Slots) -> jax.Array:
        free, full = jnp.sum(~slots.alive), jnp.any(_full(slots))
        return jnp.any(slots.alive) & (free < want_free) & ~full & (slots.clock < end)

    def step(slots: Slots) -> Slots:
        alive = slots.alive
        drawn = _draw(slots, model.unembed(), sampling)
        ended = jnp.any(drawn.tokens[:, None] == terminators[None, :], axis=1) | (slots.count + 1 >= slots.limit)
        ring = slots.tokens.shape[1]
        place = slots.clock % ring
        cache = dataclasses.replace(slots.cache, index=slots.cache.positions.shape[1] - ring + place)
        hidden, cache = model(
            drawn.tokens[:, None],
            positions=slots.position[:, None],
            segment_ids=alive.astype(jnp.int32)[:, None],
            cache=cache,
            layers=layers,
        )

        def put(held: jax.Array, new: jax.Array) -> jax.Array:
            """A column of the ring, where the slot is alive: a response waits untouched until it is fetched."""
            old = jax.lax.dynamic_slice_in_dim(held, place, 1, axis=1)[:, 0]
            return jax.lax.dynamic_update_slice(held, jnp.where(alive, new, old)[:, None], (0, place))

        rows = jnp.arange(len(alive))
        return dataclasses.replace(
            slots,
            cache=cache,
            hidden=hidden[:, -1],
            position=slots.position + alive,
            count=slots.count + alive,
            alive=alive & ~ended,
            clock=slots.clock + 1,
            tokens=put(slots.tokens, drawn.tokens),
            logps=put(slots.logps, drawn.logps),
            model_logps=put(slots.model_logps, drawn.model_logps),
            seen=slots.seen.at[rows, drawn.tokens].set(True, mode="drop"),
            recent=jnp.concatenate([slots.recent, drawn.tokens[:, None]], axis=1)[:, 1:],
        )

    return jax.lax.while_loop(more, step, slots)


def _full(slots: Slots) -> jax.Array:
    """Bool[B]: a response goes on, and its next token would take the place of its first."""
    return slots.alive & (slots.count >= slots.tokens.shape[1])


def grow(slots: Slots, response: int) -> Slots:
    """With rings of `response` tokens. One array after the other, and each old one is freed: no two caches at once."""
    ring = slots.tokens.shape[1]

    def stretch(held: jax.Array, axis: int) -> jax.Array:
        found = _stretching(axis, ring, response, held.sharding)(held, slots.clock)
        held.delete()
        return found

    rings = {name: stretch(getattr(slots, name), 1) for name in ("tokens", "logps", "model_logps")}
    cache = dataclasses.replace(
        slots.cache,
        layers=jax.tree.map(lambda held: stretch(held, 2), slots.cache.layers),
        positions=stretch(slots.cache.positions, 1),
        segment_ids=stretch(slots.cache.segment_ids, 1),
    )
    return dataclasses.replace(slots, cache=cache, **rings)


@functools.cache
def _stretching(axis: int, ring: int, response: int, sharding: Any) -> Any:
    """A program by which the last `ring` places of an axis become `response`; what has not been written yet is 0."""

    def stretch(held: jax.Array, clock: jax.Array) -> jax.Array:
        room = held.shape[axis] - ring
        steps = clock - 1 - (clock - 1 - jnp.arange(response)) % response  # the last that wrote to each place
        shape = [response if i == axis else 1 for i in range(held.ndim)]
        taken = jnp.take(held, room + steps % ring, axis=axis)
        taken = jnp.where((steps >= clock - ring).reshape(shape), taken, 0)
        return jnp.concatenate([jax.lax.slice_in_dim(held, 0, room, axis=axis), taken], axis=axis)

    return jax.jit(stretch, out_shardings=sharding)


def _draw(slots: Slots, unembedding: Unembedding, sampling: Sampling) -> Drawn:
    logits = _logits(slots.hidden, unembedding)
    drawn = sample(
        jax.vmap(jax.random.fold_in)(slots.keys, slots.count),
        logits,
        allowed=_allowed(slots.recent, sampling.bad_words, logits.shape[1]),
        seen=slots.seen if slots.seen.shape[1] else None,
        repetition_penalty=sampling.repetition_penalty,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
    )
    return drawn._replace(tokens=drawn.tokens.astype(jnp.int32))


def _allowed(recent: jax.Array, bad_words: tuple[tuple[int, ...], ...], vocabulary: int) -> jax.Array | None:
    """Bool[B V], False on the last token of each bad word whose others were just drawn."""
    if not bad_words:
        return None
    allowed = jnp.ones((len(recent), vocabulary), bool)
    for *before, last in bad_words:
        tail = recent[:, recent.shape[1] - len(before) :]
        complete = jnp.all(tail == jnp.array(before, jnp.int32)[None, :], axis=1)
        allowed = allowed.at[:, last].set(allowed[:, last] & ~complete)
    return allowed


def _logits(hidden: jax.Array, unembedding: Unembedding) -> jax.Array:
    """Float32[B V] of one position; a sampler needs them all."""
    weight = unembedding.weight.astype(hidden.dtype)
    logits = jnp.einsum("bd,vd->bv", hidden, weight, preferred_element_type=jnp.float32)
    if unembedding.bias is not None:
        logits = logits + unembedding.bias.astype(jnp.float32)[None, :]
    cap = unembedding.softcap
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def _placed(slots: Slots, layout: Layout | None) -> Slots:
    """Slots cut over the mesh as rows of a batch are, key heads as heads are."""
    if layout is None:
        return slots

    def place(x: jax.Array) -> jax.Array:
        if x.ndim == 0:
            return x
        cut = x.ndim == 4 and x.shape[1] % layout.mesh.shape[layout.heads] == 0
        spec = P(layout.rows, layout.heads) if cut else P(layout.rows)
        return jax.lax.with_sharding_constraint(x, NamedSharding(layout.mesh, spec))

    return jax.tree.map(place, slots)
