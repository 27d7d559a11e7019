"""`jaxalign generate` that is interrupted, cannot write, or has a server that fails: finished responses stay."""

import errno
import json
import os
import signal
import threading
import time

import pytest

from jaxalign.cli.main import main
from jaxalign.rollout.engine.slots import Sampling
from jaxalign.rollout.respond import load_model, respond
from tests.rollout.hostile import MODELS, Hostile, http
from tests.shared import WORDS

PROMPTS = ["the cat sees", "a dog", "one red dog runs to the"]
CHOICE = {"token_ids": [7, 2], "logprobs": {"token_logprobs": [-1.0, -1.0]}, "finish_reason": "stop"}
COMPLETION = {"choices": [CHOICE]}  # a server's


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("written", [True, False])
def test_ctrl_c_keeps_the_responses_that_are_finished(written, tiny_model, tmp_path, capsys):
    def answer(request):
        if request.startswith("GET"):
            return MODELS
        if len(server.requests) < 4:
            return http(COMPLETION)
        if len(server.requests) == 4:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        return server.drip(b"", every=60)

    output = tmp_path / "made.jsonl"
    flags = ["--model", str(tiny_model), "--prompts", "the cat sees", "--n", "4", "--batch-size", "1"]
    with Hostile(answer) as server:
        began = time.perf_counter()
        options = ["--engine", server.url, *(["--output", str(output)] if written else [])]
        assert main(["generate", *flags, *options]) == 130
    assert time.perf_counter() - began < 20
    shown = capsys.readouterr()
    if written:
        row = {"prompt": "the cat sees", "response": f" {WORDS[7]}", "finished": True}
        assert [json.loads(line) for line in output.read_text().splitlines()] == [row, row] and shown.out == ""
    else:
        assert shown.out == "\n\n".join([f"> the cat sees\n {WORDS[7]}"] * 2) + "\n"
    assert "2 of 4 responses were finished" in shown.err and shown.err.splitlines()[-1] == "jaxalign: interrupted"


def test_responses_of_this_machine_are_handed_on_as_they_end(tiny_model):
    """Whatever is raised there ends the call: the next response is not drawn."""
    finished = {}

    def hand_on(number, response):
        finished[number] = response
        if len(finished) == 2:
            raise KeyboardInterrupt

    model = load_model(str(tiny_model), dtype="float32")
    sampling = Sampling(12)
    whole = respond(model, PROMPTS, sampling, batch_size=1, on_response=lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        respond(model, PROMPTS, sampling, batch_size=1, on_response=hand_on)
    assert finished == dict(enumerate(whole[:2]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_text("mine"), "exists already; name another file, or move that one away"),
        (lambda path: path.symlink_to("nowhere"), "exists already"),
        (lambda path: path.mkdir(), "is a folder"),
        (lambda path: path.parent.write_text("file"), "is a file, so nothing can be made in it"),
        (lambda path: path.with_name("made.jsonl.partial").mkdir(), "cannot be written (Is a directory)"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_read(make, message, tmp_path, capsys):
    output = tmp_path / "in" / "made.jsonl"
    if "is a file" not in message:
        output.parent.mkdir()
    make(output)
    before = sorted(tmp_path.rglob("*"))
    assert main(["generate", "--model", "none", "--prompts", "the cat", "--output", str(output)]) == 2
    [shown] = capsys.readouterr().err.splitlines()
    assert f"--output {output.parent}" in shown and message in shown and sorted(tmp_path.rglob("*")) == before
    assert not output.is_file() or output.read_text() == "mine"


def test_a_full_disk_leaves_the_responses_on_the_screen(tiny_model, tmp_path, monkeypatch, capsys):
    def full(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    output = tmp_path / "made.jsonl"
    with Hostile(lambda request: MODELS if request.startswith("GET") else http(COMPLETION)) as server:
        flags = ["--model", str(tiny_model), "--prompts", "the cat sees", "--engine", server.url]
        assert main(["generate", *flags, "--output", str(output)]) == 2
    shown = capsys.readouterr()
    assert shown.out == f" {WORDS[7]}\n" and list(tmp_path.iterdir()) == []
    assert f"--output {output} cannot be written (No space left on device); the responses are above" in shown.err


def test_a_server_is_told_the_special_token_to_stop_at(tiny_model, capsys):
    stopped = {"token_ids": [7, 1], "logprobs": {"token_logprobs": [-1.0, -1.0]}, "finish_reason": "stop"}
    with Hostile(lambda request: MODELS if request.startswith("GET") else http({"choices": [stopped]})) as server:
        flags = ["--model", str(tiny_model), "--prompts", "the cat sees", "--engine", server.url]
        assert main(["generate", *flags, "--stop", "<s>"]) == 0
    body = json.loads(server.requests[-1].partition("\r\n\r\n")[2])
    assert body["stop_token_ids"] == [2, 1] and body["stop"] == ["<s>"]
    assert capsys.readouterr().out == f" {WORDS[7]}\n"


def test_a_server_that_answers_what_cannot_be_is_one_line_and_status_2(tiny_model, tmp_path, capsys):
    beyond = {"token_ids": [7, 32], "logprobs": {"token_logprobs": [-1.0, -1.0]}, "finish_reason": "length"}
    with Hostile(lambda request: MODELS if request.startswith("GET") else http({"choices": [beyond]})) as server:
        flags = ["--model", str(tiny_model), "--prompts", "the cat sees", "--engine", server.url]
        assert main(["generate", *flags, "--output", str(tmp_path / "made.jsonl")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"{server.url}/v1/completions: 'token_ids' holds 32; a token must be a whole number from 0 to 31" in line
    assert list(tmp_path.iterdir()) == []
