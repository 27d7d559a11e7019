"""Engines, which draw a response to each request: `LocalEngine` here, on the training devices; `HttpEngine` in http.py.

    engine = LocalEngine(graphdef, slots=32)
    responses = engine.generate(params, requests, key, sampling=Sampling(max_new_tokens=256, terminators=(2,)))

A response depends on its prompt, its seed, the key and the sampling, never on its neighbours, the number of slots or
the order of requests, up to the rounding of differently shaped products.
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxalign import hosts
from jaxalign.clock import elapsed
from jaxalign.mistake import Mistake
from jaxalign.models.places import device_bytes
from jaxalign.rollout.engine import slots as device
from jaxalign.rollout.engine.params import LAYOUTS, DecodingParams, decoding_like, decoding_params, is_like
from jaxalign.rollout.engine.slots import Admitted, Sampling, Slots
from jaxalign.types import PyTree

PROMPT_BUCKET = 32  # prompts are padded to a power of two, at least this one, so that few programs are compiled
FIRST_RING = 64  # response tokens that every slot first has room for; doubled when a response needs more
STOP_EVERY = 16  # tokens between two searches for stop strings
SHOW_EVERY = 4  # tokens between two calls of `watch`
NO_LIMIT = np.iinfo(np.int32).max // 2
HAND_EVERY = 64  # tokens between two looks for responses to hand to `on_response`, and for Ctrl-C


class Request(NamedTuple):
    """A prompt, and the seed and length limit of a response to it."""

    prompt: tuple[int, ...]
    seed: int  # together with the key of the call, it decides every draw
    max_new_tokens: int | None = None  # at most sampling.max_new_tokens; None means that


class Response(NamedTuple):
    """A drawn response. Log-probabilities in nats, one per token."""

    tokens: np.ndarray  # Int32[R], the terminator included
    logps: np.ndarray  # Float32[R], under the distribution that the tokens were drawn from
    model_logps: np.ndarray  # Float32[R], under the model itself, at temperature 1
    finished: bool  # it ended with a terminator or a stop string, not at the limit


WatchFn = Callable[[int, np.ndarray], None]  # (number of a request, its tokens so far)
OnResponse = Callable[[int, Response], None]  # (number of a request, the response to it)


class Stats(NamedTuple):
    """Time and counts of an engine's last call."""

    seconds: float  # without those of compilation
    tokens: int  # drawn
    steps: int  # one draws a token for every slot
    prompt_tokens: int  # read, without padding


class Engine(Protocol):
    """Interface of engines: `LocalEngine`, or `HttpEngine`, whose params may be None if its server has some."""

    stats: Stats

    def generate(
        self,
        params: PyTree | None,
        requests: Sequence[Request],
        key: jax.Array,
        *,
        sampling: Sampling,
        on_response: OnResponse | None = None,
    ) -> list[Response]: ...


class LocalEngine:
    """Generates with the model that trains, on the devices that its parameters are on.

    If those belong to several hosts, all hosts make the same call, take every step together, and return all responses.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        *,
        slots: int = 16,
        refill: bool = True,
        cache_dtype: Any = None,
        layout: str = "training",
        decode_text: Callable[[Sequence[int], Sequence[int]], str] | None = None,
    ):
        """
        Args:
          graphdef: of a decoder.
          slots: requests in flight; rounded up to a multiple of the devices that rows are split over.
          refill: whether a free slot takes the next request at once; if not, all wait for the longest response.
          cache_dtype: of cached keys and values: a float or int8; None is the dtype of computation.
          layout: of the parameters during a call, as in params.py: "training" saves memory, "tensor" time on a mesh,
            that of the graphdef.
          decode_text: (ids of a prompt, ids of its response) -> the response's text, to search for stop strings.
        """
        if slots < 1:
            raise Mistake(f"slots={slots} must be at least 1")
        if layout not in LAYOUTS:
            raise Mistake(f"layout={layout!r} is not one of {', '.join(LAYOUTS)}")
        self._graphdef, self._slots, self._refill = graphdef, slots, refill
        self._cache_dtype = None if cache_dtype is None else jnp.dtype(cache_dtype)
        self._layout, self._decode_text = layout, decode_text
        self._alone = jax.process_count() == 1
        self.stats = Stats(0.0, 0, 0, 0)

    def generate(
        self,
        params: PyTree | DecodingParams,
        requests: Sequence[Request],
        key: jax.Array,
        *,
        sampling: Sampling,
        watch: WatchFn | None = None,
        on_response: OnResponse | None = None,
    ) -> list[Response]:
        """A response to each request, in their order.

        `watch` is called with those that are not yet finished, `on_response` with each when it is.

        Raises:
          Mistake: an empty prompt, an impossible limit, or stop strings without `decode_text`.
        """
        self._check(requests, sampling)
        if not requests:
            return []
        began = time.perf_counter()
        longest = max(_limit(r, sampling) for r in requests)
        if not isinstance(params, DecodingParams):
            params = decoding_params(self._graphdef, params, layout=self._layout)
        slots = device.empty_slots(
            self._graphdef,
            params.tree,
            slots=self._slots,
            prompt=_bucket(max(len(r.prompt) for r in requests)),
            response=min(longest, FIRST_RING),
            sampling=sampling,
            cache_dtype=self._cache_dtype,
        )
        table = _Table(requests, sampling, len(slots.alive), on_response)
        most = SHOW_EVERY if watch else STOP_EVERY if sampling.stop else HAND_EVERY if on_response else NO_LIMIT
        while True:
            if table.may_take(self._refill):
                slots = self._admit(params, slots, table, key)
            if not table.active:
                break
            slots = self._decode(params, slots, table, sampling, most)
            slots, full = self._collect(slots, table, sampling, watch)
            if full:
                slots = device.grow(slots, min(2 * slots.tokens.shape[1], longest))
        tokens = sum(len(r.tokens) for r in table.responses.values())
        self.stats = Stats(elapsed(began), tokens, int(slots.clock), table.prompt_tokens)
        return [table.responses[number] for number in range(len(requests))]

    def memory(self, params: PyTree, *, prompt: int, sampling: Sampling) -> tuple[int, int]:
        """Bytes of a device in a call, beside its share of `params`: (copies of weights, the slots at their longest).

        Args:
          params: arrays or ShapeDtypeStructs, with their places.
          prompt: tokens of the longest prompt.
          sampling: of the call.
        """
        decoding = decoding_like(self._graphdef, params, layout=self._layout)
        before, after = (
            jax.tree.leaves({name: x for name, x in tree.items() if name != "blocks"})
            for tree in (params, decoding.tree)
        )
        copied = [x for x, was in zip(after, before, strict=True) if not is_like(was, x)]
        slots = device.slots_like(
            self._graphdef,
            decoding.tree,
            slots=self._slots,
            prompt=_bucket(prompt),
            response=sampling.max_new_tokens,
            sampling=sampling,
            cache_dtype=self._cache_dtype,
        )
        return device_bytes([copied, decoding.layers]), device_bytes(slots)

    def _check(self, requests: Sequence[Request], sampling: Sampling) -> None:
        for number, request in enumerate(requests):
            if not request.prompt:
                raise Mistake(f"request {number} has an empty prompt, so there is nothing to continue")
            if not 1 <= _limit(request, sampling) <= sampling.max_new_tokens:
                raise Mistake(
                    f"request {number} asks for {_limit(request, sampling)} tokens; it must be 1 to max_new_tokens="
                    f"{sampling.max_new_tokens}"
                )
        if sampling.stop and self._decode_text is None:
            raise Mistake(f"stop strings {sampling.stop} need decode_text, which decodes ids to text")

    def _admit(self, params: DecodingParams, slots: Slots, table: _Table, key: jax.Array) -> Slots:
        numbers, places = table.take()
        distinct = list(
            dict.fromkeys(table.requests[n].prompt for n in numbers)
        )  # a prompt of several requests is read once
        rows, entries = _power(len(distinct)), _power(len(numbers))
        width = _bucket(max(map(len, distinct)))
        prompts, mask = np.zeros((rows, width), np.int32), np.zeros((rows, width), bool)
        for row, prompt in enumerate(distinct):
            prompts[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, True
        table.prompt_tokens += int(mask.sum())
        row_of = {prompt: row for row, prompt in enumerate(distinct)}
        requests = [table.requests[n] for n in numbers]

        def padded(values: Sequence[int], padding: int) -> np.ndarray:
            return np.array([*values, *[padding] * (entries - len(values))], np.int32)

        new = Admitted(
            prompts,
            mask,
            slot=padded(places, table.slots),
            source=padded([row_of[r.prompt] for r in requests], 0),
            keys=self.request_keys(key, padded([r.seed for r in requests], 0)),
            limit=padded([_limit(r, table.sampling) for r in requests], 1),
        )
        return device.admit(self._graphdef, params, slots, new)

    def request_keys(self, key: jax.Array, seeds: np.ndarray) -> jax.Array:
        """Typed keys [A], which decide the draws of requests with these seeds."""
        return request_keys(key, seeds)

    def _decode(self, params: DecodingParams, slots: Slots, table: _Table, sampling: Sampling, most: int) -> Slots:
        """The slots after `most` tokens, or once another eighth is free, enough for a prefill, or all if none waits."""
        want = table.slots + 1
        if table.waiting and self._refill:
            want = table.slots - len(table.active) + max(1, table.slots // 8)
        return device.decode(self._graphdef, params, slots, want, most, sampling=sampling)

    def _collect(self, slots: Slots, table: _Table, sampling: Sampling, watch: WatchFn | None) -> tuple[Slots, bool]:
        """Fetches ended responses; (the slots without them, whether a response that goes on fills its ring)."""
        arrays = slots.alive, slots.count, slots.start, slots.tokens, slots.logps, slots.model_logps
        alive, count, start, *rings = jax.device_get(arrays) if self._alone else map(hosts.gather, arrays)
        stopped, full = [], False
        for place in list(table.active):
            order = (start[place] + np.arange(count[place])) % rings[0].shape[1]
            tokens, logps, model_logps = (ring[place, order] for ring in rings)
            request = table.requests[table.active[place]]
            cut = self._stop(request.prompt, tokens, sampling.stop) if sampling.stop else None
            if cut is None and alive[place]:
                full |= len(tokens) == rings[0].shape[1]
                if watch is not None:
                    watch(table.active[place], tokens)
                continue
            ended = cut is not None or int(tokens[-1]) in sampling.terminators
            cut = len(tokens) if cut is None else cut
            table.finish(place, Response(tokens[:cut], logps[:cut], model_logps[:cut], ended))
            stopped += [place] if alive[place] else []
        if stopped:
            slots = _kill(slots, np.isin(np.arange(table.slots), stopped))
        return slots, full

    def _stop(self, prompt: Sequence[int], tokens: np.ndarray, stop: Iterable[str]) -> int | None:
        """Number of tokens at which the first stop string is complete; None if there is none."""
        assert self._decode_text is not None

        def stops(count: int) -> bool:
            response = self._decode_text(prompt, tokens[:count].tolist())
            return any(text in response for text in stop)

        if not stops(len(tokens)):
            return None
        return next(count for count in range(1, len(tokens) + 1) if stops(count))


class _Table:
    """Place of each request: waiting, active in a slot, or finished."""

    def __init__(self, requests: Sequence[Request], sampling: Sampling, slots: int, on_response: OnResponse | None):
        self.requests, self.sampling, self._on_response = requests, sampling, on_response
        self.slots = slots
        self.waiting = collections.deque(range(len(requests)))
        self.active: dict[int, int] = {}  # slot -> number of its request
        self.responses: dict[int, Response] = {}
        self.prompt_tokens = 0
        self._free = collections.deque(range(slots))

    def may_take(self, refill: bool) -> bool:
        """True if a request waits and a slot is free, or all slots are, unless they are refilled one by one."""
        return bool(self.waiting and self._free) and (refill or not self.active)

    def take(self) -> tuple[list[int], list[int]]:
        """The next requests, and a free slot for each."""
        count = min(len(self._free), len(self.waiting))
        numbers = [self.waiting.popleft() for _ in range(count)]
        places = [self._free.popleft() for _ in range(count)]
        self.active.update(zip(places, numbers, strict=True))
        return numbers, places

    def finish(self, place: int, response: Response) -> None:
        number = self.active.pop(place)
        self.responses[number] = response
        self._free.append(place)
        if self._on_response is not None:
            self._on_response(number, response)


@jax.jit
def request_keys(key: jax.Array, seeds: jax.Array) -> jax.Array:
    """Typed keys [A], one for each seed; they decide the draws of every engine."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, seeds)


@jax.jit
def _kill(slots: Slots, stopped: jax.Array) -> Slots:
    return dataclasses.replace(slots, alive=slots.alive & ~stopped)


def _limit(request: Request, sampling: Sampling) -> int:
    return sampling.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens


def _power(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _bucket(length: int) -> int:
    return max(PROMPT_BUCKET, _power(length))
