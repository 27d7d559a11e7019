"""A server that answers what it likes: nothing of it is believed, and none of it lasts longer than allowed."""

import asyncio
import re
import time

import pytest

from jaxalign.rollout.engine.http import EngineError
from tests.rollout.hostile import (
    KEY,
    MODELS,
    REQUESTS,
    SAMPLING,
    Hostile,
    answering,
    ask,
    asking,
    drawn,
    engine_of,
    http,
)

WRONG = {
    "too many tokens": ({"tokens": [5] * 5, "logps": [-1.0] * 5}, "holds 5 tokens; it must hold 1 to 4"),
    "no tokens": ({"tokens": [], "logps": []}, "holds 0 tokens; it must hold 1 to 4"),
    "beyond the vocabulary": ({"tokens": [5, 20, 2]}, "holds 20; a token must be a whole number from 0 to 19"),
    "beyond int32": ({"tokens": [5, 2**70, 2]}, f"holds {2**70}; a token must be"),
    "negative": ({"tokens": [5, -1, 2]}, "holds -1; a token must be"),
    "a float": ({"tokens": [5, 6.0, 2]}, "holds 6.0; a token must be"),
    "a boolean": ({"tokens": [5, True, 2]}, "holds True; a token must be"),
    "a text": ({"tokens": [5, "6", 2]}, "holds 6; a token must be"),
    "null": ({"tokens": [5, None, 2]}, "holds None; a token must be"),
    "a list": ({"tokens": [5, [6], 2]}, r"holds \[6\]; a token must be"),
    "behind the end": ({"tokens": [5, 2, 2]}, "holds tokens behind 2; it must end with the first terminator"),
    "a positive log-prob": ({"logps": [-1.0, 0.5, -1.0]}, "holds 0.5; a log-prob must be a finite number, at most 0"),
    "no number": ({"logps": [-1.0, float("nan"), -1.0]}, "holds nan; a log-prob must be"),
    "minus infinity": ({"logps": [-1.0, float("-inf"), -1.0]}, "holds -inf; a log-prob must be"),
    "beyond float32": ({"logps": [-1.0, -1e39, -1.0]}, r"holds -1e\+39; a log-prob must be"),
    "a true log-prob": ({"logps": [-1.0, False, -1.0]}, "holds False; a log-prob must be"),
    "a log-prob as text": ({"logps": [-1.0, "-1", -1.0]}, "holds -1; a log-prob must be"),
    "another reason": ({"reason": "abort"}, "'finish_reason' is 'abort'; it must be 'stop' or 'length'"),
    "a number as reason": ({"reason": 5}, "is 5; it must be a text"),
}


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_nothing_of_an_answer_is_believed_that_was_not_checked(kind):
    answers = []
    with Hostile(lambda request: answering(answers[-1])(request)) as server:
        engine = engine_of(server, kind=kind, vocabulary=20)
        answers.append(drawn(kind))
        [response] = asking(engine)
        assert response.tokens.tolist() == [5, 6, 2] and response.finished
        for changes, message in WRONG.values():
            answers.append(drawn(kind, **changes))
            with pytest.raises(EngineError, match=message) as error:
                asking(engine)
            key = "'token_ids'|'token_logprobs'|reason'" if kind == "vllm" else "'output_token_logprobs'|reason'|'type'"
            assert re.search(f"^{server.url}/.*({key})", str(error.value)) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({}, "'choices' is absent; it must hold a list"),
        ([], r"holds \[\], not an object"),
        (b"", "broke off, or does not speak HTTP"),
        (http(b""), "holds None, not an object"),
        ({"choices": {}}, "'choices' is {}; it must be a list"),
        ({"choices": [5]}, "'choices' holds 5, not an object"),
        ({"choices": [{}, {}]}, "'choices' holds 2 responses; it must hold 1"),
        ({"choices": [{"token_ids": [5], "finish_reason": "stop"}]}, "'logprobs' is absent; it must hold an object"),
        ({"choices": [{"logprobs": {"tokens": [" a"]}}]}, "'token_ids' is absent, and 'tokens' holds texts"),
        ({"choices": [{"logprobs": {"tokens": ["token_id:" + "9" * 5000]}}]}, "'token_ids' is absent, and 'tokens'"),
        (http(b"[" * 200_000), "answers what is no JSON"),
        (http(b"9" * 5000), "answers what is no JSON"),
        (http(b"\x1f\x8b0", Content_Encoding="gzip"), "answers what is no JSON"),
        (http(b"", "500 \x1b[31mred"), r"says 500 \\x1b\[31mred: nothing more"),
    ],
)
def test_an_answer_of_another_shape_is_one_line(answer, message):
    with Hostile(answering(answer)) as server, pytest.raises(EngineError, match=message) as error:
        ask(server, attempts=1)
    assert str(error.value).startswith(f"{server.url}/v1/completions") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"id": "m", "max_model_len": "64"}, "'max_model_len' is 64; it must be a whole number"),
        ({"id": "m", "max_model_len": True}, "'max_model_len' is True; it must be a whole number"),
        ({"id": "m", "max_model_len": 0}, "'max_model_len' is 0; it must be at least 1"),
        ({"id": 5}, "'id' is 5; it must be a text"),
        ({}, "'id' is absent; it must hold a text"),
        ("\x1b[2J", r"holds \\x1b\[2J, not an object"),
    ],
)
def test_a_server_that_describes_its_model_wrongly_is_refused(model, message):
    with Hostile(lambda request: http({"data": [model]})) as server, pytest.raises(EngineError, match=message):
        engine_of(server).served()


def flood(head, part):
    yield head
    for _ in range(1 << 14):
        yield part


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("head", "timed out: an answer must be whole 0.5 s after its request"),
        ("body", "timed out"),
        ("error", "timed out"),
        ("silence", "timed out"),
        ("long body", "answers more than the 1,0..,... bytes that this request can need"),
        ("long error", "answers more than the 1,0..,... bytes that this request can need"),
        ("long head", "broke off, or does not speak HTTP"),
    ],
)
def test_an_answer_has_one_deadline_and_a_largest_size(name, message):
    ok, broken = b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 500 Error\r\n"
    answers = {
        "head": lambda: server.drip(ok),
        "body": lambda: server.drip(ok + b"Content-Length: 9999\r\n\r\n"),
        "error": lambda: server.drip(broken + b"\r\n"),
        "silence": lambda: server.drip(b"", every=60),
        "long body": lambda: flood(ok + b"\r\n", b"x" * (1 << 16)),
        "long error": lambda: flood(broken + b"\r\n", b"x" * (1 << 16)),
        "long head": lambda: flood(ok, b"X-Y: 1\r\n" * 1000),
    }
    began = time.perf_counter()
    with Hostile(lambda request: MODELS if request.startswith("GET") else answers[name]()) as server:
        seconds = 0.5 if message.startswith("timed") else 60
        with pytest.raises(EngineError, match=message):
            ask(server, seconds=seconds, attempts=1 if name == "long head" else 4)
    assert time.perf_counter() - began < 10
    assert len(server.requests) == 2  # neither is tried again


def test_a_notebook_whose_event_loop_runs_already_can_use_a_server():
    async def cell():
        return engine_of(server).served()["id"]

    with Hostile(lambda request: MODELS) as server:
        assert asyncio.run(cell()) == "tiny"


def test_one_failure_ends_all_requests_and_what_came_before_it_is_handed_on():
    answers = iter([http(drawn("vllm")), None, http(b"", "400 No")])

    def answer(request):
        if request.startswith("GET"):
            return MODELS
        content = next(answers)
        time.sleep(0.2 if content and b"400" in content else 0)
        return server.drip(b"", every=60) if content is None else content

    responses, began = {}, time.perf_counter()
    with Hostile(answer) as server, pytest.raises(EngineError, match="says 400 No"):
        engine = engine_of(server, seconds=60)
        engine.generate(None, REQUESTS[:3], KEY, sampling=SAMPLING, on_response=responses.__setitem__)
    assert [response.tokens.tolist() for response in responses.values()] == [[5, 6, 2]]
    assert time.perf_counter() - began < 10
