"""The device's side of generation: B slots with one request each; a step draws one token for every slot.

A slot has room for one prompt, padded on the left, and behind it a ring of R tokens, which all slots write at the same
place, clock mod R. Positions and segment ids record what each place of a slot holds. So a slot can take its next
request at any time, and a step writes its tokens by one slice, however old the slots' requests are. Rings start short;
before one would overwrite the beginning of its own response, all slots stop until `grow` has made the rings longer.
Memory and attention thus cost what responses need, not what they may need at most.

Axis letters: B slots, P prompt, R ring, V vocabulary, D model width; F prompts and A requests that are admitted.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jaxalign.kernels.products import times
from jaxalign.models.decoder.cache import Cache, empty_cache
from jaxalign.models.places import Layout
from jaxalign.ops.sampling import Drawn, sample
from jaxalign.rollout.engine.params import DecodingParams
from jaxalign.types import PyTree, Unembedding


class Sampling(NamedTuple):
    """How tokens are drawn, in order: repetition penalty, bad words, temperature, top-k, top-p, min-p. Hashable."""

    max_new_tokens: int = 128
    temperature: float = 1.0  # 0 always takes the most likely token
    top_k: int = 0  # 0 draws from all tokens
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # of tokens in the prompt or in the response so far; 1 is none
    terminators: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()  # texts that end a response and are part of it
    bad_words: tuple[tuple[int, ...], ...] = ()  # sequences of ids that are never drawn

    @classmethod
    def of(cls, config: Any, terminators: Sequence[int] = (), stop: Sequence[str] = ()) -> Sampling:
        """The sampling settings of a command's config; one that the config lacks keeps its default."""
        names = "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"
        settings = {name: getattr(config, name) for name in names if hasattr(config, name)}
        return cls(**settings, terminators=tuple(terminators), stop=tuple(stop))

    @property
    def truncates(self) -> bool:
        """True if tokens are drawn from another distribution than softmax(logits / temperature)."""
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
    """State of the slots between two calls of `decode`."""

    cache: Cache
    hidden: jax.Array  # [B D], the hidden state that the next token is drawn from
    keys: jax.Array  # typed keys [B], one for each request
    position: jax.Array  # Int32[B], of the next token
    count: jax.Array  # Int32[B], tokens drawn
    limit: jax.Array  # Int32[B], largest number of tokens
    alive: jax.Array  # Bool[B], whether the response goes on
    start: jax.Array  # Int32[B], the clock when the request was admitted
    clock: jax.Array  # Int32[], steps since the engine began
    tokens: jax.Array  # Int32[B R], in the order of the ring
    logps: jax.Array  # Float32[B R]
    model_logps: jax.Array  # Float32[B R]
    seen: jax.Array  # Bool[B V], tokens of prompt and response; [B 0] without a repetition penalty
    recent: jax.Array  # Int32[B W], the last W tokens, W = length of the longest bad word - 1; -1: none


class Admitted(NamedTuple):
    """Requests for free slots. Several may share a prompt; those with slot number B are padding."""

    prompts: jax.Array  # Int32[F P], padded on the left
    mask: jax.Array  # Bool[F P]
    slot: jax.Array  # Int32[A], number of the slot
    source: jax.Array  # Int32[A], number of the prompt
    keys: jax.Array  # typed keys [A]
    limit: jax.Array  # Int32[A]


@functools.partial(jax.jit, static_argnames=("graphdef", "slots", "prompt", "response", "sampling", "cache_dtype"))
def empty_slots(
    graphdef: nnx.GraphDef,
    params: PyTree,
    *,
    slots: int,
    prompt: int,
    response: int,
    sampling: Sampling,
    cache_dtype: Any,
) -> Slots:
    """Free slots, with room for prompts of `prompt` tokens and rings of `response` tokens.

    Their number is rounded up to a multiple of the devices that rows are split over.
    """
    model = nnx.merge(graphdef, params)
    layout = model.compute.layout
    slots += -slots % (1 if layout is None else math.prod(layout.mesh.shape[axis] for axis in layout.rows))
    dtype = model.compute.dtype if cache_dtype is None else cache_dtype
    ring, column = functools.partial(jnp.zeros, (slots, response)), functools.partial(jnp.zeros, slots)
    width = max((len(word) - 1 for word in sampling.bad_words), default=0)
    return _placed(
        Slots(
            cache=empty_cache(model.config, slots, prompt + response, dtype),
            hidden=jnp.zeros((slots, model.config.hidden_size), model.compute.dtype),
            keys=jax.random.split(jax.random.key(0), slots),
            position=column(jnp.int32),
            count=column(jnp.int32),
            limit=column(jnp.int32),
            alive=column(bool),
            start=column(jnp.int32),
            clock=jnp.int32(0),
            tokens=ring(jnp.int32),
            logps=ring(jnp.float32),
            model_logps=ring(jnp.float32),
            seen=jnp.zeros((slots, model.config.vocab_size if sampling.repetition_penalty != 1 else 0), bool),
            recent=jnp.full((slots, width), -1, jnp.int32),
        ),
        layout,
    )


def slots_like(graphdef: nnx.GraphDef, params: PyTree, **options: Any) -> Slots:
    """Shapes, dtypes and places of `empty_slots`, whose options it takes; the params may be ShapeDtypeStructs."""
    layout = nnx.merge(graphdef, params).compute.layout
    like = jax.eval_shape(functools.partial(empty_slots, graphdef, **options), params)
    one = SingleDeviceSharding(jax.local_devices()[0])

    def placed(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one if layout is None else _place(x, layout))

    return jax.tree.map(placed, like)


def admit(graphdef: nnx.GraphDef, params: DecodingParams, slots: Slots, new: Admitted) -> Slots:
    """The slots with new requests, their prompts in the cache.

    Prefill and insertion are jitted separately, so that prefill is not recompiled when the rings grow.
    """
    hidden, cache = _prefill(graphdef, params, new.prompts, new.mask, dtype=slots.cache.layers[0].key.dtype)
    return _insert(graphdef, params, slots, new, hidden, cache)


@functools.partial(jax.jit, static_argnames=("graphdef", "dtype"))
def _prefill(
    graphdef: nnx.GraphDef, params: DecodingParams, prompts: jax.Array, mask: jax.Array, *, dtype: Any
) -> tuple[jax.Array, Cache]:
    """(the last hidden state [F D] of each prompt, a cache of the prompts alone)."""
    model = nnx.merge(graphdef, params.tree)
    segments = mask.astype(jnp.int32)
    hidden, cache = model(
        prompts,
        positions=jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0),
        segment_ids=segments,
        cache=empty_cache(model.config, *prompts.shape, dtype),
        layers=model.layers(params.layers),
    )
    return hidden[:, -1], cache


@functools.partial(jax.jit, static_argnames="graphdef", donate_argnames="slots")
def _insert(
    graphdef: nnx.GraphDef, params: DecodingParams, slots: Slots, new: Admitted, hidden: jax.Array, cache: Cache
) -> Slots:
    """The slots with the new requests, given the last hidden states and the cache of their prompts."""
    width = new.prompts.shape[1]
    room = slots.cache.positions.shape[1] - slots.tokens.shape[1]

    def put(array: jax.Array, values: jax.Array) -> jax.Array:
        return array.at[new.slot].set(values, mode="drop")

    def put_prompt(array: jax.Array, values: jax.Array) -> jax.Array:
        """Writes keys or values [F Hk width K] at the end of the prompt's room."""
        return array.at[new.slot, :, room - width : room].set(values[new.source], mode="drop")

    def put_whole(array: jax.Array, values: jax.Array) -> jax.Array:
        """Writes positions or segments [F width] there, and 0 in the rest of the slot, which empties the ring."""
        return put(array, jnp.pad(values[new.source], ((0, 0), (room - width, array.shape[1] - room))))

    layers = jax.tree.map(put_prompt, slots.cache.layers, cache.layers)
    seen, recent = _history(slots, new)
    last = cache.positions[:, -1][new.source]
    repeated = functools.partial(jnp.full, new.slot.shape)
    return _placed(
        dataclasses.replace(
            slots,
            cache=dataclasses.replace(
                slots.cache,
                layers=layers,
                positions=put_whole(slots.cache.positions, cache.positions),
                segment_ids=put_whole(slots.cache.segment_ids, cache.segment_ids),
            ),
            hidden=put(slots.hidden, hidden[new.source]),
            keys=put(slots.keys, new.keys),
            position=put(slots.position, last + 1),
            count=put(slots.count, repeated(0)),
            limit=put(slots.limit, new.limit),
            alive=put(slots.alive, repeated(True)),
            start=put(slots.start, repeated(slots.clock)),
            seen=put(slots.seen, seen),
            recent=put(slots.recent, recent),
        ),
        nnx.merge(graphdef, params.tree).compute.layout,
    )


def _history(slots: Slots, new: Admitted) -> tuple[jax.Array, jax.Array]:
    """`seen` [A V] and `recent` [A W] after the prompts."""
    tokens, mask = new.prompts[new.source], new.mask[new.source]
    vocabulary, width = slots.seen.shape[1], slots.recent.shape[1]
    ids = jnp.where(mask, tokens, vocabulary)  # padding is out of bounds, and dropped
    rows = jnp.arange(len(ids))[:, None]
    seen = jnp.zeros((len(ids), vocabulary), bool).at[rows, ids].set(True, mode="drop")
    marked = jnp.pad(jnp.where(mask, tokens, -1), ((0, 0), (width, 0)), constant_values=-1)
    return seen, marked[:, marked.shape[1] - width :]


@functools.partial(jax.jit, static_argnames=("graphdef", "sampling"), donate_argnames="slots")
def decode(
    graphdef: nnx.GraphDef,
    params: DecodingParams,
    slots: Slots,
    want_free: jax.Array,
    most: jax.Array,
    *,
    sampling: Sampling,
) -> Slots:
    """The slots after steps until `want_free` are free, none is alive, a ring is full, or `most` steps were taken."""
    model = nnx.merge(graphdef, params.tree)
    layers = model.layers(params.layers)
    terminators = jnp.array(sampling.terminators, jnp.int32)
    end = slots.clock + most

    def goes_on(slots: Slots) -> jax.Array:
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

        def put(rings: jax.Array, new: jax.Array) -> jax.Array:
            """Writes a column of the rings of slots that are alive; an ended response stays until it is fetched."""
            old = jax.lax.dynamic_slice_in_dim(rings, place, 1, axis=1)[:, 0]
            return jax.lax.dynamic_update_slice(rings, jnp.where(alive, new, old)[:, None], (0, place))

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

    return jax.lax.while_loop(goes_on, step, slots)


def _full(slots: Slots) -> jax.Array:
    """Bool[B], True where a response goes on and its next token would overwrite its first."""
    return slots.alive & (slots.count >= slots.tokens.shape[1])


def grow(slots: Slots, response: int) -> Slots:
    """The slots with rings of `response` tokens. Arrays grow one by one, each freed before the next: no two caches."""
    ring = slots.tokens.shape[1]

    def stretch(array: jax.Array, axis: int) -> jax.Array:
        longer = _stretching(axis, ring, response, array.sharding)(array, slots.clock)
        array.delete()
        return longer

    rings = {name: stretch(getattr(slots, name), 1) for name in ("tokens", "logps", "model_logps")}
    cache = dataclasses.replace(
        slots.cache,
        layers=jax.tree.map(lambda array: stretch(array, 2), slots.cache.layers),
        positions=stretch(slots.cache.positions, 1),
        segment_ids=stretch(slots.cache.segment_ids, 1),
    )
    return dataclasses.replace(slots, cache=cache, **rings)


@functools.cache
def _stretching(axis: int, ring: int, response: int, sharding: Any) -> Any:
    """A jitted function that makes the last `ring` places of an axis `response` places; those not yet written are 0."""

    def stretch(array: jax.Array, clock: jax.Array) -> jax.Array:
        room = array.shape[axis] - ring
        steps = clock - 1 - (clock - 1 - jnp.arange(response)) % response  # the last step that wrote each place
        shape = [response if i == axis else 1 for i in range(array.ndim)]
        taken = jnp.take(array, room + steps % ring, axis=axis)
        taken = jnp.where((steps >= clock - ring).reshape(shape), taken, 0)
        return jnp.concatenate([jax.lax.slice_in_dim(array, 0, room, axis=axis), taken], axis=axis)

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
    """Bool[B V], False on the last token of each bad word whose other tokens were just drawn; None without any."""
    if not bad_words:
        return None
    allowed = jnp.ones((len(recent), vocabulary), bool)
    for *before, last in bad_words:
        tail = recent[:, recent.shape[1] - len(before) :]
        complete = jnp.all(tail == jnp.array(before, jnp.int32)[None, :], axis=1)
        allowed = allowed.at[:, last].set(allowed[:, last] & ~complete)
    return allowed


def _logits(hidden: jax.Array, unembedding: Unembedding) -> jax.Array:
    """Float32[B V], of one position; sampling needs the whole vocabulary."""
    weight = unembedding.weight.astype(hidden.dtype)
    logits = times("bd,vd->bv", hidden, weight)
    if unembedding.bias is not None:
        logits = logits + unembedding.bias.astype(jnp.float32)[None, :]
    cap = unembedding.softcap
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def _placed(slots: Slots, layout: Layout | None) -> Slots:
    """The slots sharded as the rows of a batch are, and the cache's key heads as heads are."""
    if layout is None:
        return slots

    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, _place(x, layout)), slots)


def _place(x: Any, layout: Layout) -> NamedSharding:
    if x.ndim == 0:
        return NamedSharding(layout.mesh, P())
    cut = x.ndim == 4 and x.shape[1] % layout.mesh.shape[layout.heads] == 0
    return NamedSharding(layout.mesh, P(layout.rows, layout.heads) if cut else P(layout.rows))
