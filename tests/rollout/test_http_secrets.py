"""The key of a server goes to the origin that was named, and is never shown."""

import pytest

from jaxalign.cli.main import main
from jaxalign.rollout.engine.http import EngineError
from tests.rollout.hostile import MODELS, Hostile, answering, ask, drawn, http

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
