"""The engine of a server: the local engine's responses, over HTTP, through failures, with published params."""

import asyncio
import functools
import re
import socket
import time

import jax
import numpy as np
import pytest

from jaxalign.cli.main import main
from jaxalign.models.decoder.decoder import make_decoder
from jaxalign.models.files import huggingface
from jaxalign.models.files.load import load_params
from jaxalign.models.files.save import save_pretrained
from jaxalign.rollout.engine.engine import LocalEngine, Request
from jaxalign.rollout.engine.http import EngineError, HttpEngine
from jaxalign.rollout.engine.servers import parse_reload
from jaxalign.rollout.engine.slots import Sampling
from tests.rollout.hostile import MODELS, Hostile, http

KEY = jax.random.key(3)
SAMPLING = Sampling(8, terminators=(2,))
REQUESTS = [Request(prompt, seed) for seed, prompt in enumerate([(1, 4, 6), (5,), (1, 4, 6), (9, 10, 11, 12)])]


@pytest.fixture(scope="module")
def local(tiny_model):
    """(params, an engine) of what the server is started with."""
    config = huggingface.read_config(str(tiny_model))
    return load_params(str(tiny_model), config), LocalEngine(make_decoder(config, remat="none")[0], slots=8)


def engine_of(server, **options):
    return HttpEngine(server.url, **{"concurrency": 3, "pause": 0.01, "seconds": 60, **options})


def same(responses, expected):
    for ours, theirs in zip(responses, expected, strict=True):
        assert ours.tokens.tolist() == theirs.tokens.tolist() and ours.finished == theirs.finished
        np.testing.assert_allclose(ours.logps, theirs.logps, rtol=1e-6, atol=1e-6)
    return True


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_server_draws_what_the_local_engine_draws(local, server, kind):
    params, engine = local
    for sampling in (SAMPLING, SAMPLING._replace(temperature=0.5)):
        expected = engine.generate(params, REQUESTS, KEY, sampling=sampling)
        responses = engine_of(server, kind=kind).generate(None, REQUESTS, KEY, sampling=sampling)
        assert same(responses, expected)
        for ours, theirs in zip(responses, expected, strict=True):
            known = theirs.model_logps if sampling.temperature == 1 else np.full(len(theirs.tokens), np.nan)
            np.testing.assert_allclose(ours.model_logps, known, atol=1e-6)


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_params_travel_through_a_folder_and_are_loaded_before_a_token_is_drawn(
    local, server, kind, tiny_model, tmp_path
):
    params, engine = local
    params = jax.tree.map(lambda x: 1.5 * x, params)
    config = huggingface.read_config(str(tiny_model))

    def publish(params):
        save_pretrained(tmp_path / "policy", params, config, huggingface.read_hf_config(str(tiny_model)))
        return tmp_path / "policy"

    responses = engine_of(server, kind=kind, publish=publish).generate(params, REQUESTS, KEY, sampling=SAMPLING)
    assert same(responses, engine.generate(params, REQUESTS, KEY, sampling=SAMPLING))
    assert server.folder == tmp_path / "policy"
    loading = {"vllm": ["/collective_rpc", "/reset_prefix_cache"], "sglang": ["/update_weights_from_disk"]}[kind]
    assert server.seen[1 : 1 + len(loading)] == loading


def test_a_server_that_stumbles_is_asked_again(local, server):
    params, engine = local
    server.failures = [(503, "starting"), (500, "out of memory"), (429, "busy")]
    responses = engine_of(server).generate(None, REQUESTS, KEY, sampling=SAMPLING)
    assert same(responses, engine.generate(params, REQUESTS, KEY, sampling=SAMPLING))
    assert len(server.seen) == 1 + len(REQUESTS) + 3


@pytest.mark.parametrize(
    ("failures", "attempts", "message"),
    [
        (
            [(500, "CUDA error\nat line 3")] * 9,
            2,
            r"/v1/models says 500 .*: CUDA error; the log .* more \(attempt 2\)$",
        ),
        ([(404, "no")] * 9, 4, r"says 404 Not Found: no; it does not know this path"),
        (
            [(401, "\x1b[31mwho?")] * 9,
            4,
            r"says 401 Unauthorized: \\x1b\[31mwho\?; put its key into JAXALIGN_ENGINE_KEY",
        ),
        ([(200, "<html>")], 4, "answers what is no JSON"),
        ([(200, '{"data": []}')], 4, r'names no model, but says \{"data": \[\]\}'),
    ],
)
def test_what_a_server_says_at_last_is_one_line_with_the_way_out(server, failures, attempts, message):
    server.failures = failures
    with pytest.raises(EngineError, match=message) as error:
        engine_of(server, attempts=attempts).generate(None, REQUESTS, KEY, sampling=SAMPLING)
    assert server.url in str(error.value) and "\n" not in str(error.value)
    assert len(server.seen) == (2 if attempts == 2 else 1)  # what will not pass is not tried again


def test_nobody_at_the_address_is_told_as_that():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(EngineError, match=r"cannot be reached \(.*refused.*\); is the server up.* \(attempt 2\)"):
        HttpEngine(f"http://127.0.0.1:{port}", attempts=2, pause=0.01).served()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(EngineError, match=r"timed out: an answer must be whole 0.1 s after"):
            HttpEngine(address, attempts=1, seconds=0.1).served()


def without(name):
    def edit(answer):
        for choice in answer.get("choices", []):
            for part in (choice, choice["logprobs"]):
                part.pop(name, None)
        return answer

    return edit


def log_probs_of_nothing(answer):
    for choice in answer.get("choices", []):
        choice["logprobs"]["token_logprobs"] = [None]
    return answer


def ended_by_another(answer):
    for choice in answer.get("choices", []):
        choice["finish_reason"], choice["token_ids"][-1] = "stop", 5
    return answer


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            without("logprobs"),
            "'choices': 'logprobs' is absent; it must hold an object; is it a server of `engine_kind`",
        ),
        (without("token_logprobs"), "'logprobs': 'token_logprobs' is absent; it must hold a list"),
        (log_probs_of_nothing, r"holds 1 log-probs of \d tokens; there must be one for each"),
        (ended_by_another, r"ended a response with token 5, which is none of the terminators \[2\]"),
    ],
)
def test_an_answer_that_cannot_be_learned_from_is_refused(server, edit, message):
    server.edit = edit
    with pytest.raises(EngineError, match=message):
        engine_of(server).generate(None, REQUESTS[:1], KEY, sampling=SAMPLING)


def test_older_servers_name_tokens_in_the_log_probs(local, server):
    params, engine = local
    server.edit = without("token_ids")
    responses = engine_of(server).generate(None, REQUESTS, KEY, sampling=SAMPLING)
    assert same(responses, engine.generate(params, REQUESTS, KEY, sampling=SAMPLING))


def test_what_a_server_cannot_be_asked_is_refused(server):
    ask = functools.partial(engine_of(server).generate, key=KEY)
    with pytest.raises(ValueError, match="bad_words are sequences of ids"):
        ask(None, REQUESTS, sampling=SAMPLING._replace(bad_words=((3,),)))
    with pytest.raises(ValueError, match="has no way to load params"):
        ask({}, REQUESTS, sampling=SAMPLING)
    for url in ("localhost:8000", "file:///etc/passwd", "http://"):
        with pytest.raises(ValueError, match="is no address of a server; give one like http://localhost:8000"):
            HttpEngine(url)
    assert server.seen == []


def test_ones_own_way_of_loading_is_paths_and_json():
    load, reset = parse_reload('/load {"path": {"here": "{folder}/x"}, "n": 1}  /reset')
    assert (load.path, load.of("/runs/a")) == ("/load", {"path": {"here": "/runs/a/x"}, "n": 1})
    assert (reset.path, reset.of("/runs/a")) == ("/reset", {})
    deep = "/a " + '{"a":' * 100_000
    for text, message in (
        (deep, "behind /a is no JSON"),
        ("load", "'load' is no path"),
        ("/a {x}", "behind /a is no JSON"),
        (" ", "names no path"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_reload(text)


# A server that does what it likes


def ask(server, **options):
    """The responses of a hostile server to one request for four tokens out of twenty."""
    return asking(engine_of(server, vocabulary=20, **options))


def asking(engine):
    return engine.generate(None, REQUESTS[:1], KEY, sampling=SAMPLING._replace(max_new_tokens=4))


def drawn(kind, *, tokens=(5, 6, 2), logps=(-1.0, -0.5, 0.0), reason="stop"):
    """A right answer, unless it is told otherwise."""
    if kind == "vllm":
        choice = {"token_ids": tokens, "logprobs": {"token_logprobs": logps}, "finish_reason": reason}
        return {"choices": [choice]}
    pairs = [[logp, token, None] for logp, token in zip(logps, tokens, strict=True)]
    return {"meta_info": {"output_token_logprobs": pairs, "finish_reason": {"type": reason}}}


def answering(answer):
    return lambda request: (
        MODELS if request.startswith("GET") else answer if isinstance(answer, bytes) else http(answer)
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


SECRET = "key-of-the-server"


@pytest.fixture
def secret(monkeypatch):
    monkeypatch.setenv("JAXALIGN_ENGINE_KEY", SECRET)


def moved(target, status="307 Temporary Redirect"):
    return http(b"", status, Location=target)


@pytest.mark.usefixtures("secret")
@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
def test_the_key_goes_to_the_origin_that_was_named_and_nowhere_else(status, monkeypatch):
    with Hostile(lambda request: MODELS) as thief:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, thief.url)
        other = f"{thief.url}/v1/completions"
        for answer in (lambda request: moved(other, status), answering(moved(other, status))):
            with Hostile(answer) as server, pytest.raises(EngineError, match=f"redirects to {thief.url}, another ori"):
                ask(server)
            assert all(f"Bearer {SECRET}" in request for request in server.requests)
            assert len(server.requests) == len({request.split()[0] for request in server.requests})  # no second try
    assert thief.requests == []


@pytest.mark.usefixtures("secret")
def test_a_redirect_within_the_origin_is_followed_with_body_and_key():
    def answer(request):
        path = request.split()[1]
        if not path.startswith("/moved"):
            return moved(f"/moved{path}")
        return MODELS if path == "/moved/v1/models" else http(drawn("vllm"))

    with Hostile(answer) as server:
        assert ask(server)[0].tokens.tolist() == [5, 6, 2]
    first, second = server.requests[2:]
    assert first.partition("\r\n\r\n")[2] == second.partition("\r\n\r\n")[2] != "" and SECRET in second
    with Hostile(lambda request: moved("/again")) as server, pytest.raises(EngineError, match="more than 4 times"):
        ask(server)


@pytest.mark.usefixtures("secret")
def test_a_server_that_repeats_the_key_does_not_have_it_shown(monkeypatch):
    repeated = f"Authorization: Bearer {SECRET}".encode()
    for answer in (http(repeated, "500 Error"), http(b"", f"500 {SECRET}"), repeated + b"\r\n\r\n"):
        with Hostile(lambda request, answer=answer: answer) as server, pytest.raises(EngineError) as error:
            ask(server, attempts=1)
        assert "***" in str(error.value) and SECRET not in str(error.value)
    monkeypatch.setenv("JAXALIGN_ENGINE_KEY", f"{SECRET}\nx")
    with Hostile(answering({})) as server, pytest.raises(ValueError, match="ENGINE_KEY holds a character") as error:
        ask(server)
    assert SECRET not in str(error.value) and server.requests == []


@pytest.mark.parametrize(
    "url",
    [
        "http://me:{}@HOST",
        "http://{}@HOST/v1",
        "me:{}@HOST",
        "ftp://me:{}@HOST",
        "http://m:{}/x@HOST",
        "http://HOST?k={}",
    ],
)
def test_a_password_in_the_address_is_refused_and_never_printed(url, tiny_model, capsys, tmp_path):
    with Hostile(answering(drawn("vllm"))) as server:
        url = url.format(SECRET).replace("HOST", server.url.removeprefix("http://"))
        prompt = ["--model", str(tiny_model), "--engine", url, "--max-new-tokens", "4"]
        assert main(["generate", *prompt, "--prompts", "the cat"]) == 2
        data = tmp_path / "prompts.jsonl"
        data.write_text('{"prompt": "the cat"}\n')
        run = ["--data", str(data), "--reward", "tests.commands.rewards:dogs", "--output", str(tmp_path / "run")]
        run += ["--max-length", "16", "--batch-size", "1", "--mesh.fsdp", "8"]
        assert main(["grpo", *prompt, *run]) == 2
    shown = capsys.readouterr()
    assert SECRET not in shown.out + shown.err and "Traceback" not in shown.err and not (tmp_path / "run").exists()
    assert server.requests == []


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
    held = iter([http(drawn("vllm")), None, http(b"", "400 No")])

    def answer(request):
        if request.startswith("GET"):
            return MODELS
        content = next(held)
        time.sleep(0.2 if content and b"400" in content else 0)
        return server.drip(b"", every=60) if content is None else content

    responses, began = {}, time.perf_counter()
    with Hostile(answer) as server, pytest.raises(EngineError, match="says 400 No"):
        engine = engine_of(server, seconds=60)
        engine.generate(None, REQUESTS[:3], KEY, sampling=SAMPLING, on_response=responses.__setitem__)
    assert [response.tokens.tolist() for response in responses.values()] == [[5, 6, 2]]
    assert time.perf_counter() - began < 10
