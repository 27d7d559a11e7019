"""The engine of a server: the local engine's responses, over HTTP, through failures, with published params."""

import functools
import socket

import jax
import numpy as np
import pytest

from jaxalign.models.decoder.decoder import make_decoder
from jaxalign.models.files import huggingface
from jaxalign.models.files.load import load_params
from jaxalign.models.files.save import save_pretrained
from jaxalign.rollout.engine.engine import LocalEngine
from jaxalign.rollout.engine.http import EngineError, HttpEngine
from jaxalign.rollout.engine.servers import parse_reload
from tests.rollout.hostile import KEY, REQUESTS, SAMPLING, engine_of


@pytest.fixture(scope="module")
def local(tiny_model):
    """(params, an engine) of what the server is started with."""
    config = huggingface.read_config(str(tiny_model))
    return load_params(str(tiny_model), config), LocalEngine(make_decoder(config, remat="none")[0], slots=8)


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
