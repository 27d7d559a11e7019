"""The engine of a server: requests over HTTP, params through a folder that both can read.

    engine = HttpEngine("http://localhost:8000", publish=write_policy)   # params -> the folder they were written to
    responses = engine.generate(params, requests, key, sampling=sampling)

`servers.py` describes how the server must be started. As with the local engine, a response depends only on its prompt,
its seed, the key and the sampling, if the server obeys seeds; but its random numbers are other ones than the local
engine's. Standard library only.
"""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import math
import os
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxalign.mistake import Mistake
from jaxalign.rollout.engine.engine import Request, Response, Stats, request_keys
from jaxalign.rollout.engine.servers import SERVERS, Post
from jaxalign.rollout.engine.slots import Sampling
from jaxalign.types import PyTree

KEY_VARIABLE = "JAXALIGN_ENGINE_KEY"  # environment variable with the key that the server requires (--api-key)
WAYS_OUT = {
    401: f"put its key into {KEY_VARIABLE}",
    403: f"put its key into {KEY_VARIABLE}",
    404: "it does not know this path; rollout/engine/servers.py describes how it must be started",
}
PublishFn = Callable[[PyTree], Path]
CheckFn = Callable[[PyTree, Sequence[Request], Sequence[Response], Sampling], None]


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
        concurrency: int = 64,
        seconds: float = 600.0,
        attempts: int = 4,
        pause: float = 1.0,
    ):
        """
        Args:
          url: http://host:port of the server; /v1 behind it is ignored.
          kind: a name in SERVERS.
          publish: writes params to a folder that the server reads; None: it serves what it was started with.
          reload: requests that make it read the folder; None: those of its kind.
          check: called with (params, requests, responses, sampling) after every call with params; raises EngineError
            where responses are not those of the params.
          concurrency: requests in flight.
          seconds: time limit of one answer.
          attempts: number of tries when the connection is lost, or the server answers that it is at fault or busy.
          pause: seconds before the second try; doubled before each further one.

        Raises:
          Mistake: not an http address, or an unknown kind.
        """
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise Mistake(f"engine {url!r} is no address of a server; give one like http://localhost:8000")
        if kind not in SERVERS:
            raise Mistake(f"engine kind {kind!r} is not one of {', '.join(SERVERS)}")
        self._url, self._server = url.rstrip("/").removesuffix("/v1"), SERVERS[kind]
        self._publish, self._reload = publish, self._server.reload if reload is None else reload
        self._check, self._concurrency, self._seconds = check, concurrency, seconds
        self._attempts, self._pause = attempts, pause
        self._model: str | None = None
        self.stats = Stats(0.0, 0, 0, 0)

    def served(self) -> dict[str, Any]:
        """The server's description of its model: `id`, and maybe `max_model_len` in tokens. Raises EngineError."""
        answer = self._send("/v1/models", None, threading.Event())
        try:
            model = answer["data"][0]
            self._model = str(model["id"])
        except (KeyError, IndexError, TypeError):
            raise EngineError(f"{self._url}/v1/models names no model, but says {_shown(answer)}") from None
        return model

    def generate(
        self, params: PyTree | None, requests: Sequence[Request], key: jax.Array, *, sampling: Sampling
    ) -> list[Response]:
        """A response to each request, in their order. Params are first published, and loaded by the server.

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
        responses = self._respond_to_all(requests, seeds, sampling)
        if params is not None and self._check is not None and requests:
            self._check(params, requests, responses, sampling)
        tokens, prompt_tokens = sum(len(r.tokens) for r in responses), sum(len(r.prompt) for r in requests)
        self.stats = Stats(time.perf_counter() - began, tokens, 0, prompt_tokens)
        return responses

    def _load(self, params: PyTree) -> None:
        folder = str(self._publish(params))
        for post in self._reload:
            self._send(post.path, post.of(folder), threading.Event())

    def _respond_to_all(self, requests: Sequence[Request], seeds: Sequence[int], sampling: Sampling) -> list[Response]:
        """Responses in the order of the requests, sent concurrently; one that fails stops those that have not begun."""
        stopped = threading.Event()
        pool = concurrent.futures.ThreadPoolExecutor(max_workers=self._concurrency)
        try:
            calls = [pool.submit(self._respond, r, s, sampling, stopped) for r, s in zip(requests, seeds, strict=True)]
            done, _ = concurrent.futures.wait(calls, return_when=concurrent.futures.FIRST_EXCEPTION)
            for call in done:
                call.result()  # raises the error of a failed one, which need not be the first in order
            return [call.result() for call in calls]
        finally:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _respond(self, request: Request, seed: int, sampling: Sampling, stopped: threading.Event) -> Response:
        limit = sampling.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens
        body = self._server.body(self._model or "", request, limit, seed, sampling)
        answer = self._send(self._server.path, body, stopped)
        where = self._url + self._server.path
        try:
            tokens, logps, finished = self._server.read(answer)
        except (KeyError, IndexError, TypeError) as error:
            raise EngineError(
                f"{where} answers without {error}, so tokens or log-probs are unknown ({_shown(answer)}); is it a "
                "server of `engine_kind`, and new enough?"
            ) from None
        if not tokens or len(tokens) != len(logps) or not all(map(_is_finite, logps)):
            raise EngineError(
                f"{where} gives {len(tokens)} tokens with the log-probs {_shown(logps)}; there must be one for each"
            )
        if finished and not sampling.stop and tokens[-1] not in sampling.terminators:
            raise EngineError(
                f"{where} ended a response with token {tokens[-1]}, which is none of the terminators "
                f"{list(sampling.terminators)}; its model's eos_token_id must be among those of `model`"
            )
        drawn_logps = np.array(logps, np.float32)
        same = not sampling.truncates and sampling.temperature == 1
        model_logps = drawn_logps if same else np.full_like(drawn_logps, np.nan)
        finished = finished or tokens[-1] in sampling.terminators
        return Response(np.array(tokens, np.int32), drawn_logps, model_logps, finished)

    def _send(self, path: str, body: dict[str, Any] | None, stopped: threading.Event) -> Any:
        """The JSON that the server answers at a path; None for an empty answer."""
        where = self._url + path
        for attempt in range(1, self._attempts + 1):
            permanent, problem = True, ""
            try:
                return _exchange(where, body, self._seconds)
            except urllib.error.HTTPError as error:
                with error:
                    problem = f"says {error.code} {error.reason}: {_first_line(error)}"
                permanent = error.code < 500 and error.code != 429
                problem += f"; {WAYS_OUT.get(error.code, 'the log of the server says more')}"
            except (OSError, http.client.HTTPException) as error:
                permanent = False
                problem = f"cannot be reached ({_reason(error)}); is the server up, and its port open to this host?"
            except ValueError as error:
                problem = f"answers what is no JSON ({error}); is it a server of this kind?"
            if permanent or attempt == self._attempts or stopped.is_set():
                tries = f" (attempt {attempt})" if attempt > 1 else ""
                raise EngineError(f"{where} {problem}{tries}") from None
            stopped.wait(self._pause * 2 ** (attempt - 1))
        raise AssertionError("the last attempt returns or raises")


def _exchange(where: str, body: dict[str, Any] | None, seconds: float) -> Any:
    headers = {"Content-Type": "application/json"}
    if os.environ.get(KEY_VARIABLE):
        headers["Authorization"] = f"Bearer {os.environ[KEY_VARIABLE]}"
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(where, data, headers), timeout=seconds) as answer:
        content = answer.read()
    return json.loads(content) if content.strip() else None


def _wire_seeds(key: jax.Array, requests: Sequence[Request]) -> list[int]:
    """The first 64 bits of each request's key, which is the key of the local engine, as a signed integer."""
    keys = request_keys(key, np.array([r.seed for r in requests], np.uint32))
    words = np.asarray(jax.random.key_data(keys), np.uint32)[:, :2]
    return [int.from_bytes(row.astype(">u4").tobytes(), "big", signed=True) for row in words]


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _first_line(error: urllib.error.HTTPError) -> str:
    try:
        text = error.read(2000).decode("utf-8", "replace").strip()
    except (OSError, http.client.HTTPException):
        return "nothing more"
    return _shown(text.splitlines()[0]) if text else "nothing more"


def _shown(value: Any) -> str:
    """The beginning of a server's words, without characters that a terminal would obey."""
    text = value if isinstance(value, str) else json.dumps(value)
    return "".join(c if c.isprintable() else " " for c in text[:200])


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", error)
    return f"{type(reason).__name__}: {reason}" if isinstance(reason, Exception) else str(reason)
