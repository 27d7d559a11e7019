"""Requests to servers that generate, and their answers: token ids and a seed in, token ids and log-probs out.

vLLM, POST /v1/completions:

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs --max-model-len 2048

Its log-probs are by default the model's own, before the temperature; policies are trained on those of the distribution
that the tokens were drawn from, which --logprobs-mode gives. The variable opens /collective_rpc, whose reload_weights
reads a folder, and /reset_prefix_cache, needed because cached prompts were computed with the old weights. Anybody who
can reach these paths can run the server's methods, so keep its port behind a firewall.
https://docs.vllm.ai/en/latest/features/sleep_mode/, https://github.com/vllm-project/vllm/pull/32133

SGLang, POST /generate:

    python -m sglang.launch_server --model-path MODEL --enable-deterministic-inference

Its log-probs are of the tempered distribution, unless SGLANG_RETURN_ORIGINAL_LOGPROB is set; seeds count with that flag
only. /update_weights_from_disk reads a folder and empties the cache.
https://docs.sglang.io/advanced_features/sglang_for_rl.html

Requests state every sampling setting, because servers take absent ones from the model's generation_config.json. The
run and the server must see the folder of the policy under the same path. A server that was started with --api-key
gets its key from the environment variable JAXALIGN_ENGINE_KEY.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxalign.mistake import Mistake
from jaxalign.outside import Fields, brief
from jaxalign.rollout.engine.engine import Request
from jaxalign.rollout.engine.slots import Sampling

LEAST_LOGP = float(np.finfo(np.float32).min)
ROUNDING = 1e-5  # a log-prob may be this much above 0, and is then 0


class Completion(NamedTuple):
    """A server's answer to one request."""

    tokens: list[int]  # the terminator included
    logps: list[float]  # nats, one per token
    finished: bool  # it did not end at the limit


class Drawn(NamedTuple):
    """A completion as the server says it, unchecked but for its shape."""

    tokens: list[Any]
    logps: list[Any]
    reason: str  # why it ended


class Post(NamedTuple):
    """A request that makes a server load a policy; {folder} in its values is replaced by the policy's folder."""

    path: str
    body: dict[str, Any]

    def of(self, folder: str) -> dict[str, Any]:
        """The body for a folder."""
        return _filled(self.body, folder)


def _filled(value: Any, folder: str) -> Any:
    if isinstance(value, dict):
        return {name: _filled(part, folder) for name, part in value.items()}
    return value.replace("{folder}", folder) if isinstance(value, str) else value


class Server(NamedTuple):
    """A kind of server."""

    path: str  # of generation
    body: Callable[[str, Request, int, int, Sampling], dict]  # (model, request, its limit, seed, sampling) -> body
    read: Callable[[Fields], Drawn]  # (answer) -> completion; Mistake on another shape
    keys: tuple[str, str]  # under which an answer holds tokens and log-probs
    reload: tuple[Post, ...]  # load a new policy


def _vllm_body(model: str, request: Request, limit: int, seed: int, sampling: Sampling) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": list(request.prompt),
        "n": 1,
        "seed": seed,
        "max_tokens": limit,
        "logprobs": 0,  # only that of the drawn token
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,  # for versions that do not know the line above
        "include_stop_str_in_output": True,
        **_shared(sampling),
    }


def _sglang_body(model: str, request: Request, limit: int, seed: int, sampling: Sampling) -> dict[str, Any]:
    settings = {"max_new_tokens": limit, "sampling_seed": seed, **_shared(sampling)}
    return {"input_ids": list(request.prompt), "sampling_params": settings, "return_logprob": True}


def _shared(sampling: Sampling) -> dict[str, Any]:
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": list(sampling.terminators),
        "stop": list(sampling.stop),
        "skip_special_tokens": False,  # stop texts may hold some
    }


def _read_vllm(answer: Fields) -> Drawn:
    choices = answer.get("choices", list)
    if len(choices) != 1:
        raise Mistake(f"{answer.where}: 'choices' holds {len(choices)} responses; it must hold 1, as was requested")
    choice = Fields(choices[0], f"{answer.where}: 'choices'")
    logprobs = Fields(choice.get("logprobs", dict), f"{choice.where}: 'logprobs'")
    tokens = choice.get("token_ids", list, None)
    if tokens is None:
        tokens = [text.removeprefix("token_id:") for text in logprobs.texts("tokens")]
        if not all(re.fullmatch("[0-9]{1,10}", text) for text in tokens):
            raise Mistake(f"{choice.where}: 'token_ids' is absent, and 'tokens' holds texts instead of ids")
        tokens = [int(text) for text in tokens]
    return Drawn(tokens, logprobs.get("token_logprobs", list), choice.get("finish_reason", str))


def _read_sglang(answer: Fields) -> Drawn:
    info = Fields(answer.get("meta_info", dict), f"{answer.where}: 'meta_info'")
    pairs = info.get("output_token_logprobs", list)
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) < 2:
            raise Mistake(
                f"{info.where}: 'output_token_logprobs' holds {brief(pair)}; it must hold lists of a log-prob and a "
                "token"
            )
    reason = Fields(info.get("finish_reason", dict), f"{info.where}: 'finish_reason'").get("type", str)
    return Drawn([pair[1] for pair in pairs], [pair[0] for pair in pairs], reason)


def read_completion(
    server: Server, answer: Any, where: str, *, limit: int, vocabulary: int, terminators: Sequence[int]
) -> Completion:
    """A server's answer, of which nothing is believed that was not checked.

    Args:
      server: its kind.
      answer: the JSON that it sent.
      where: its address, for messages.
      limit: most tokens.
      vocabulary: tokens are numbers below it.
      terminators: tokens that end a response, and can only stand at its end.

    Raises:
      Mistake: names the server, the key, the value and the rule.
    """
    tokens, logps, reason = server.read(Fields(answer, where))
    ids, log_probs = server.keys
    if not 1 <= len(tokens) <= limit:
        raise Mistake(f"{where}: {ids!r} holds {len(tokens)} tokens; it must hold 1 to {limit}, as was requested")
    for token in tokens:
        if type(token) is not int or not 0 <= token < vocabulary:
            raise Mistake(
                f"{where}: {ids!r} holds {brief(token)}; a token must be a whole number from 0 to {vocabulary - 1}"
            )
    for token in tokens[:-1]:
        if token in terminators:
            raise Mistake(f"{where}: {ids!r} holds tokens behind {token}; it must end with the first terminator")
    if len(logps) != len(tokens):
        raise Mistake(
            f"{where}: {log_probs!r} holds {len(logps)} log-probs of {len(tokens)} tokens; there must be one for each"
        )
    for logp in logps:
        if type(logp) not in (int, float) or not LEAST_LOGP <= logp <= ROUNDING:
            raise Mistake(f"{where}: {log_probs!r} holds {brief(logp)}; a log-prob must be a finite number, at most 0")
    if reason not in ("stop", "length"):
        raise Mistake(f"{where}: 'finish_reason' is {brief(reason)!r}; it must be 'stop' or 'length'")
    return Completion(tokens, logps, reason == "stop")


SERVERS: dict[str, Server] = {
    "vllm": Server(
        "/v1/completions",
        _vllm_body,
        _read_vllm,
        ("token_ids", "token_logprobs"),
        (
            Post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": "{folder}"}}),
            Post("/reset_prefix_cache", {}),
        ),
    ),
    "sglang": Server(
        "/generate",
        _sglang_body,
        _read_sglang,
        ("output_token_logprobs", "output_token_logprobs"),
        (Post("/update_weights_from_disk", {"model_path": "{folder}"}),),
    ),
}


def parse_reload(text: str) -> tuple[Post, ...]:
    """Requests that load a policy, as text: '/load {"path": "{folder}"} /reset_cache'.

    Raises:
      Mistake: the text has no path, or a path is followed by something other than a JSON object.
    """
    form = f"""{brief(text)!r} is not of the form '/load {{"path": "{{folder}}"}} /reset_cache'"""
    posts, rest = [], text.strip()
    while rest:
        path, _, rest = rest.partition(" ")
        if not path.startswith("/"):
            raise Mistake(f"{form}: {path!r} is no path")
        body, rest = {}, rest.lstrip()
        if rest.startswith("{"):
            try:
                body, end = json.JSONDecoder().raw_decode(rest)
            except (ValueError, RecursionError) as error:
                raise Mistake(f"{form}: behind {path} is no JSON ({error})") from None
            rest = rest[end:].lstrip()
        posts.append(Post(path, body))
    if not posts:
        raise Mistake(f"{form}: it names no path")
    return tuple(posts)
