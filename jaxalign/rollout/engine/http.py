"""The engine of a server: requests over HTTP, params through a folder that both can read.

    engine = HttpEngine("http://localhost:8000", publish=write_policy)   # params -> the folder they were written to
    responses = engine.generate(params, requests, key, sampling=sampling)

`servers.py` describes how the server must be started. As with the local engine, a response depends only on its prompt,
its seed, the key and the sampling, if the server obeys seeds; but its random numbers are other ones than the local
engine's.

A server is not trusted. Requests, and the key with them, go to its origin (scheme, host and port) alone: no proxy of
the environment is used, and a redirect to another origin is refused. A request has one deadline, whatever the server
does, and its answer a largest size; everything in it is checked before it is used, and made visible before it is shown.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import anyio
import anyio.from_thread
import httpx2
import jax
import numpy as np

from jaxalign.clock import elapsed
from jaxalign.mistake import Mistake
from jaxalign.outside import MIB, Fields, brief
from jaxalign.rollout.engine.engine import OnResponse, Request, Response, Stats, request_keys
from jaxalign.rollout.engine.servers import SERVERS, Post, read_completion
from jaxalign.rollout.engine.slots import Sampling
from jaxalign.types import PyTree

KEY_VARIABLE = "JAXALIGN_ENGINE_KEY"  # environment variable with the key that the server requires (--api-key)
WAYS_OUT = {
    401: f"put its key into {KEY_VARIABLE}",
    403: f"put its key into {KEY_VARIABLE}",
    404: "it does not know this path; rollout/engine/servers.py describes how it must be started",
}
SHORT = 30.0  # seconds for an answer that needs no generation, and for the text of any answer once it has begun
TOKEN_BYTES = 1024  # of an answer, for each token of prompt and response; vLLM writes some 200
REDIRECTS = 5  # within the origin of the server
SHOWN = 200  # characters of a server's words

PublishFn = Callable[[PyTree], Path]
CheckFn = Callable[[PyTree, Sequence[Request], Sequence[Response], Sampling], None]
T = TypeVar("T")


class EngineError(Mistake):
    """A failed request to a server, or an unusable answer; the message has its address, its words and the way out."""


class HttpEngine:
    """Generates with a vLLM or SGLang server."""

    def __init__(
        self,
        url: str,
        *,
        kind: str = "vllm",
        publish: PublishFn | None = None,
        reload: tuple[Post, ...] | None = None,
        check: CheckFn | None = None,
        vocabulary: int = 2**31,
        concurrency: int = 64,
        seconds: float = 600.0,
        attempts: int = 4,
        pause: float = 1.0,
    ):
        """
        Args:
          url: http://host:port of the server, without name and password; /v1 behind it is ignored.
          kind: a name in SERVERS.
          publish: writes params to a folder that the server reads; None: it serves what it was started with.
          reload: requests that make it read the folder; None: those of its kind.
          check: called with (params, requests, responses, sampling) after every call with params; raises EngineError
            where responses are not those of the params.
          vocabulary: tokens are numbers below it.
          concurrency: requests in flight.
          seconds: time limit of one request, all tries together.
          attempts: number of tries when the connection is lost, or the server answers that it is at fault or busy.
          pause: seconds before the second try; doubled before each further one.

        Raises:
          Mistake: not an http address, one with a name or password, or an unknown kind.
        """
        if kind not in SERVERS:
            raise Mistake(f"engine kind {kind!r} is not one of {', '.join(SERVERS)}")
        self._url, self._server = _address(url), SERVERS[kind]
        self._publish, self._reload = publish, self._server.reload if reload is None else reload
        self._check, self._vocabulary, self._concurrency, self._seconds = check, vocabulary, concurrency, seconds
        self._attempts, self._pause = attempts, pause
        self._model: str | None = None
        self.stats = Stats(0.0, 0, 0, 0)

    def served(self) -> dict[str, Any]:
        """The server's description of its model: `id`, and maybe `max_model_len` in tokens. Raises EngineError."""
        where = f"{self._url}/v1/models"
        answer = self._wait(self._send, "/v1/models", None, MIB, min(SHORT, self._seconds))
        with _as_engine_error():
            models = Fields(answer, where).get("data", list)
            if not models:
                raise EngineError(f"{where} names no model, but says {brief(json.dumps(answer), SHOWN)}")
            model = Fields(models[0], f"{where}: 'data'")
            self._model, room = model.get("id", str), model.get("max_model_len", int, None)
            if room is not None and room < 1:
                raise EngineError(f"{where}: 'max_model_len' is {room}; it must be at least 1")
        return {"id": self._model, "max_model_len": room}

    def generate(
        self,
        params: PyTree | None,
        requests: Sequence[Request],
        key: jax.Array,
        *,
        sampling: Sampling,
        on_response: OnResponse | None = None,
    ) -> list[Response]:
        """A response to each request, in their order. Params are first published, and loaded by the server.

        `on_response` is called with each response as it arrives, from another thread.

        `model_logps` are NaN where servers do not return them: at a temperature other than 1, or with truncation.

        Raises:
          Mistake: sampling has bad words, which servers accept as texts only; or params, but no `publish`.
          EngineError: the server failed in all attempts, or its log-probs are not the policy's.
        """
        if sampling.bad_words:
            raise Mistake("bad_words are sequences of ids, which servers do not accept; generate locally")
        if params is not None and self._publish is None:
            raise Mistake(f"{self._url} has no way to load params; give HttpEngine a `publish` function, or no params")
        began = time.perf_counter()
        if self._model is None:
            self.served()
        if params is not None:
            self._load(params)
        seeds = _wire_seeds(key, requests) if requests else []
        responses = self._wait(self._respond_to_all, requests, seeds, sampling, on_response)
        if params is not None and self._check is not None and requests:
            self._check(params, requests, responses, sampling)
        tokens, prompt_tokens = sum(len(r.tokens) for r in responses), sum(len(r.prompt) for r in requests)
        self.stats = Stats(elapsed(began), tokens, 0, prompt_tokens)
        return responses

    def _load(self, params: PyTree) -> None:
        folder = str(self._publish(params))
        for post in self._reload:
            self._wait(self._send, post.path, post.of(folder), MIB, self._seconds)

    def _wait(self, send: Callable[..., Awaitable[T]], *arguments: Any) -> T:
        """The result of `send(client, *arguments)`; an error or Ctrl-C closes all connections at once.

        The event loop is another thread's, because that of a notebook has one that runs already.
        """

        async def connected() -> T:
            # a transport of our own keeps the proxies of the environment away; redirects are followed in _exchange
            limits = httpx2.Limits(max_connections=self._concurrency)
            transport = httpx2.AsyncHTTPTransport(limits=limits)
            async with httpx2.AsyncClient(transport=transport, headers=_headers(), timeout=None) as client:
                return await send(client, *arguments)

        with anyio.from_thread.start_blocking_portal() as portal:
            return portal.call(connected)

    async def _respond_to_all(
        self,
        client: httpx2.AsyncClient,
        requests: Sequence[Request],
        seeds: Sequence[int],
        sampling: Sampling,
        on_response: OnResponse | None,
    ) -> list[Response]:
        """Responses in the order of the requests, sent concurrently; one that fails ends all others."""
        responses: dict[int, Response] = {}
        free = anyio.CapacityLimiter(self._concurrency)

        async def respond(number: int) -> None:
            async with free:
                responses[number] = await self._respond(client, requests[number], seeds[number], sampling)
            if on_response is not None:
                on_response(number, responses[number])

        try:
            async with anyio.create_task_group() as group:
                for number in range(len(requests)):
                    group.start_soon(respond, number)
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [responses[number] for number in range(len(requests))]

    async def _respond(self, client: httpx2.AsyncClient, request: Request, seed: int, sampling: Sampling) -> Response:
        limit = sampling.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens
        body = self._server.body(self._model or "", request, limit, seed, sampling)
        most_bytes = MIB + TOKEN_BYTES * (len(request.prompt) + limit)
        answer = await self._send(client, self._server.path, body, most_bytes, self._seconds)
        where = self._url + self._server.path
        with _as_engine_error():
            tokens, logps, finished = read_completion(
                self._server, answer, where, limit=limit, vocabulary=self._vocabulary, terminators=sampling.terminators
            )
        if finished and not sampling.stop and tokens[-1] not in sampling.terminators:
            raise EngineError(
                f"{where} ended a response with token {tokens[-1]}, which is none of the terminators "
                f"{list(sampling.terminators)}; its model's eos_token_id must be among those of `model`"
            )
        drawn_logps = np.minimum(np.array(logps, np.float32), 0)
        same = not sampling.truncates and sampling.temperature == 1
        model_logps = drawn_logps if same else np.full_like(drawn_logps, np.nan)
        finished = finished or tokens[-1] in sampling.terminators
        return Response(np.array(tokens, np.int32), drawn_logps, model_logps, finished)

    async def _send(
        self, client: httpx2.AsyncClient, path: str, body: dict[str, Any] | None, most_bytes: int, seconds: float
    ) -> Any:
        """The JSON that the server answers at a path, all tries together within `seconds`; None for an empty answer."""
        where = self._url + path
        try:
            with anyio.fail_after(seconds):
                content = await self._send_until_answered(client, where, body, most_bytes)
        except TimeoutError:
            raise EngineError(
                f"{where} timed out: an answer must be whole {seconds:g} s after its request and {SHORT:g} s after its "
                "beginning; is the server overloaded, or the connection to it broken?"
            ) from None
        try:
            return json.loads(content) if content.strip() else None
        except (ValueError, RecursionError) as error:
            raise EngineError(
                f"{where} answers what is no JSON ({brief(str(error), SHOWN)}); is it a server of this kind?"
            ) from None

    async def _send_until_answered(
        self, client: httpx2.AsyncClient, where: str, body: dict[str, Any] | None, most_bytes: int
    ) -> bytes:
        for attempt in range(1, self._attempts + 1):
            permanent = False
            try:
                response, content = await _exchange(client, where, body, most_bytes)
                if response.is_success:
                    return content
                status = response.status_code
                permanent = status < 500 and status != 429
                problem = f"says {status} {_words(response.reason_phrase)}: {_first_line(content)}"
                problem += f"; {WAYS_OUT.get(status, 'the log of the server says more')}"
            except httpx2.ProtocolError as error:
                problem = f"broke off, or does not speak HTTP ({_reason(error)}); is a server of `engine_kind` there?"
            except httpx2.HTTPError as error:
                problem = f"cannot be reached ({_reason(error)}); is the server up, and its port open to this host?"
            if permanent or attempt == self._attempts:
                tries = f" (attempt {attempt})" if attempt > 1 else ""
                raise EngineError(f"{where} {problem}{tries}")
            await anyio.sleep(self._pause * 2 ** (attempt - 1))
        raise AssertionError("the last attempt returns or raises")


async def _exchange(
    client: httpx2.AsyncClient, where: str, body: dict[str, Any] | None, most_bytes: int
) -> tuple[httpx2.Response, bytes]:
    """The server's response, redirects within its origin followed, and the bytes behind it. Raises EngineError."""
    request = client.build_request(
        "GET" if body is None else "POST", where, content=None if body is None else json.dumps(body).encode()
    )
    origin = request.url.origin
    for _ in range(REDIRECTS):
        response = await client.send(request, stream=True)
        try:
            if response.next_request is None:
                with anyio.fail_after(SHORT):
                    return response, await _read(response, where, most_bytes)
            request = response.next_request
        finally:
            await response.aclose()
        if request.url.origin != origin:
            target = brief(f"{request.url.scheme}://{request.url.netloc.decode('ascii', 'replace')}", SHOWN)
            raise EngineError(
                f"{where} redirects to {target}, another origin, which gets neither the request nor the key; if that "
                "is the server, name it as `engine`"
            )
    raise EngineError(f"{where} redirects more than {REDIRECTS - 1} times; name the address where it ends as `engine`")


async def _read(response: httpx2.Response, where: str, most_bytes: int) -> bytes:
    content = bytearray()
    async for part in response.aiter_raw():  # never unpacked, so that no small answer becomes a huge one
        content += part
        if len(content) > most_bytes:
            raise EngineError(f"{where} answers more than the {most_bytes:,} bytes that this request can need")
    return bytes(content)


def _address(url: str) -> str:
    """The address as it is called and shown. Raises Mistake, without the secrets that the address may hold."""
    shown = repr(re.sub(r"^(\w+://)?.*@", r"\1***@", re.split("[?#]", url)[0], flags=re.DOTALL))
    try:
        parts = httpx2.URL(url)
    except httpx2.InvalidURL:
        parts = httpx2.URL()
    named = parts.scheme in ("http", "https") and parts.host and (parts.port or 80) < 1 << 16
    if not named or parts.query or parts.fragment:
        raise Mistake(f"engine {brief(shown)} is no address of a server; give one like http://localhost:8000")
    if parts.userinfo:
        raise Mistake(
            f"engine {brief(shown)} holds a name or a password, which would be written into the run's config; leave it "
            f"out, and put the key that the server requires into {KEY_VARIABLE}"
        )
    return str(parts).rstrip("/").removesuffix("/v1")


def _headers() -> dict[str, str]:
    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise Mistake(f"{KEY_VARIABLE} holds a character that no header can carry; write it anew")
    return headers | ({"Authorization": f"Bearer {key}"} if key else {})


@contextlib.contextmanager
def _as_engine_error() -> Iterator[None]:
    try:
        yield
    except EngineError:
        raise
    except Mistake as error:
        raise EngineError(f"{error}; is it a server of `engine_kind`, and new enough?") from None


def _wire_seeds(key: jax.Array, requests: Sequence[Request]) -> list[int]:
    """The first 64 bits of each request's key, which is the key of the local engine, as a signed integer."""
    keys = request_keys(key, np.array([r.seed for r in requests], np.uint32))
    words = np.asarray(jax.random.key_data(keys), np.uint32)[:, :2]
    return [int.from_bytes(row.astype(">u4").tobytes(), "big", signed=True) for row in words]


def _first_line(content: bytes) -> str:
    text = content.decode("utf-8", "replace").strip()
    return _words(text.splitlines()[0]) if text else "nothing more"


def _words(text: str) -> str:
    """A server's words without the key, which it may repeat from the request."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    return brief(text.replace(key, "***") if key else text, SHOWN)


def _reason(error: BaseException) -> str:
    """The innermost reason of an error: of "all attempts failed", why the first did."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    if isinstance(error, BaseExceptionGroup):
        return _reason(error.exceptions[0])
    if isinstance(error, OSError) and (error.errno or 0) > 0:
        return os.strerror(error.errno or 0)
    return _words(str(error) or type(error).__name__)
