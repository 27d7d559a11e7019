"""`jaxalign generate`: prompts from a file or the command line, answers in a file or on the terminal."""

import errno
import functools
import io
import json
import os
import shutil
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxalign.cli.main import main
from jaxalign.commands import generate
from jaxalign.config.inference import GenerateConfig
from jaxalign.data.sets.prompts import encode
from jaxalign.models.decoder.decoder import make_decoder
from jaxalign.models.files import huggingface
from jaxalign.models.files.load import load_params
from jaxalign.rollout.engine.slots import Sampling
from jaxalign.rollout.respond import load_model, respond
from jaxalign.rollout.rewards.rewards import RewardError, Rewards
from tests.rollout.answers import answers as rollout_answers
from tests.rollout.hostile import MODELS, Hostile, http
from tests.shared import TEMPLATE, WORDS, on_one_device

PROMPTS = ["the cat sees", "a dog", "one red dog runs to the"]
CHOICE = {"token_ids": [7, 2], "logprobs": {"token_logprobs": [-1.0, -1.0]}, "finish_reason": "stop"}
COMPLETION = {"choices": [CHOICE]}  # a server's


@pytest.fixture(scope="module")
def chat_model(tiny_model, tmp_path_factory):
    """The tiny model with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(tiny_model, folder)
    described = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(described | {"chat_template": TEMPLATE}))
    return str(folder)


answers = functools.partial(rollout_answers, max_new_tokens=12, batch_size=4)


def test_a_file_of_prompts_becomes_a_file_of_answers_in_the_same_order(tiny_model, tmp_path):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    (tmp_path / "prompts.txt").write_text("\n\n".join(PROMPTS) + "\n")
    found = []
    for name in ("prompts.jsonl", "prompts.txt"):
        output = tmp_path / "made" / f"{name}.out"
        config = GenerateConfig(str(tiny_model), str(tmp_path / name), output, max_new_tokens=12, temperature=0.0)
        assert generate.main(config) == 0
        found.append([json.loads(line) for line in output.read_text().splitlines()])
    assert found[0] == found[1]
    assert [row["prompt"] for row in found[0]] == PROMPTS
    alone = [answers(tiny_model, [prompt], temperature=0.0)[0] for prompt in PROMPTS]
    assert [(row["response"], row["finished"]) for row in found[0]] == alone


@pytest.mark.parametrize("flags", [[], ["--mesh.fsdp", "-1", "--mesh.tensor", "1"]], ids=["default", "fsdp"])
def test_a_mesh_gives_the_responses_of_one_device(flags, tiny_model, tmp_path, monkeypatch):
    """Drawn ones, since each has a key of its own. By default 8 devices cut 2 key heads in two, and rows in four."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    command = ["generate", "--model", str(tiny_model), "--prompts", str(tmp_path / "prompts.txt"), "--n", "2"]
    command += ["--max-new-tokens", "12", "--batch-size", "5"]
    loaded = []
    with_params = generate.with_params
    monkeypatch.setattr(generate, "with_params", lambda *a, **b: loaded.append(with_params(*a, **b)) or loaded[-1])
    assert main([*command, *flags, "--output", str(tmp_path / "mesh.jsonl")]) == 0
    with on_one_device():
        assert main([*command, "--output", str(tmp_path / "one.jsonl")]) == 0
    assert (tmp_path / "mesh.jsonl").read_text() == (tmp_path / "one.jsonl").read_text()
    parts = 8 if flags else 2
    for params, count in zip(loaded, (parts, 1), strict=True):
        kernels = [x for x in jax.tree.leaves(params.params.layers) if x.ndim == 2]
        assert kernels and all(x.addressable_shards[0].data.size * count == x.size for x in kernels)


def test_a_mesh_that_does_not_fill_the_devices_is_refused(tiny_model, capsys):
    command = ["generate", "--model", str(tiny_model), "--prompts", "the cat", "--mesh.data", "3"]
    assert main([*command, "--mesh.tensor", "2"]) == 2
    assert "--mesh.data 3 x --mesh.fsdp 1 x --mesh.tensor 2 does not fill 8 devices" in capsys.readouterr().err


def test_a_prompt_on_the_command_line_is_answered_on_the_terminal(tiny_model, capsys):
    config = GenerateConfig(str(tiny_model), "the cat sees", max_new_tokens=12, temperature=0.0)
    assert generate.main(config) == 0
    assert capsys.readouterr().out == answers(tiny_model, ["the cat sees"], temperature=0.0)[0][0] + "\n"


def test_what_a_pipe_cannot_say_is_written_as_its_number_and_messages_as_turns(chat_model, tmp_path, monkeypatch):
    talks = [[{"role": "system", "content": "é"}, {"role": "user", "content": "\u4e00"}], "the cat"]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps({"prompt": talk}) + "\n" for talk in talks))
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="latin-1", write_through=True))
    config = GenerateConfig(str(chat_model), str(tmp_path / "talks.jsonl"), max_new_tokens=12, temperature=0.0)
    assert generate.main(config) == 0
    said = written.getvalue().decode("latin-1")
    assert said.startswith("> system: é\n> user: \\u4e00\n") and "\n\n> the cat\n" in said


def test_a_prompt_that_ends_with_the_assistants_turn_is_refused_continued_or_cut(chat_model, tmp_path, capsys):
    talk = [{"role": "user", "content": "the cat ?"}, {"role": "assistant", "content": "a dog"}]
    (tmp_path / "talks.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    arguments = ["generate", "--model", chat_model, "--prompts", str(tmp_path / "talks.jsonl"), "--temperature", "0"]
    arguments += ["--max-new-tokens", "12"]

    def answered(*flags):
        output = tmp_path / f"{flags[-1]}.jsonl"
        assert main([*arguments, *flags, "--output", str(output)]) == 0
        return json.loads(output.read_text())

    assert main(arguments) == 2
    assert "prompt 1: the last turn of the prompt is the assistant's" in (error := capsys.readouterr().err)
    assert "--last-turn continue" in error
    [(response, finished)] = answers(chat_model, [talk[:1]], temperature=0.0)
    assert answered("--last-turn", "drop") == {"prompt": talk[:1], "response": response, "finished": finished}
    text = "<s>Human : the cat ?\nAssistant : a dog"
    [(response, finished)] = answers(chat_model, [text], temperature=0.0)
    assert answered("--last-turn", "continue") == {"prompt": talk, "response": response, "finished": finished}
    tokenizer = huggingface.load_tokenizer(chat_model)
    assert encode(talk, tokenizer, "", "continue") == encode(text, tokenizer, "")


def test_messages_are_answered_through_the_chat_template(chat_model, tmp_path):
    talk = [{"role": "user", "content": "the cat ?"}]
    (tmp_path / "talks.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    prompts = generate.read_rows(str(tmp_path / "talks.jsonl"))[0]
    rendered = "Human : the cat ?\nAssistant : "  # the tokenizer adds no <s>, and the template does
    tokenizer = huggingface.load_tokenizer(chat_model)
    ids = tokenizer("<s>" + rendered, add_special_tokens=False)["input_ids"]
    assert encode(prompts[0], tokenizer, "row 1") == ids and ids[0] == 1
    assert answers(chat_model, prompts, temperature=0.0) == answers(chat_model, ["<s>" + rendered], temperature=0.0)


def test_greedy_answers_are_the_most_likely_tokens_of_a_model_without_a_cache(tiny_model):
    from flax import nnx

    config = huggingface.read_config(str(tiny_model))
    graphdef, _ = make_decoder(config)
    model = nnx.merge(graphdef, load_params(str(tiny_model), config))
    tokenizer = huggingface.load_tokenizer(str(tiny_model))
    ids = tokenizer("the cat sees")["input_ids"]
    expected = []
    for _ in range(5):
        hidden = model(jnp.array([ids + expected]))[0, -1]
        expected.append(int(np.argmax(hidden @ model.unembed().weight.T)))
    assert 2 not in expected
    [(text, _)] = answers(tiny_model, ["the cat sees"], temperature=0.0, max_new_tokens=5)
    assert text == " " + tokenizer.decode(expected, skip_special_tokens=True)  # words are parted by one


def test_several_answers_to_a_prompt_stand_together_and_a_stop_text_ends_each(tiny_model, tmp_path):
    output = tmp_path / "answers.jsonl"
    config = GenerateConfig(str(tiny_model), "the cat sees", output, max_new_tokens=12, n=4, stop=(" ",), seed=3)
    assert generate.main(config) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["the cat sees"] * 4
    assert len({row["response"] for row in rows}) > 1
    for row in rows:
        assert row["finished"] and row["response"].count(" ") <= 1


def test_the_best_of_n_is_the_response_with_the_highest_score(tiny_model, tmp_path):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p, "answer": "dog"}) + "\n" for p in PROMPTS))
    options = {
        "max_new_tokens": 12,
        "n": 4,
        "seed": 3,
        "reward": "tests.commands.rewards:answered + tests.commands.rewards:dogs",
    }
    found = {}
    for keep in ("all", "best"):
        output = tmp_path / f"{keep}.jsonl"
        assert (
            generate.main(
                GenerateConfig(str(tiny_model), str(tmp_path / "prompts.jsonl"), output, keep=keep, **options)
            )
            == 0
        )
        found[keep] = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(found["all"]) == 12 and any(row["score"] > 1 for row in found["all"])
    for number, row in enumerate(found["best"]):
        assert row["prompt"] == PROMPTS[number] and row in found["all"]
        assert row["score"] == max(other["score"] for other in found["all"][4 * number : 4 * number + 4])
    with pytest.raises(ValueError, match="`keep` 'best' has no effect without `reward`"):
        generate.main(GenerateConfig(str(tiny_model), "the cat", keep="best"))


def test_responses_that_could_not_be_scored_are_kept_without_scores(tiny_model, tmp_path, capsys, monkeypatch):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    output, reward = tmp_path / "made.jsonl", "tests.commands.rewards:hangs(seconds=300.0)"
    flags = ["--model", str(tiny_model), "--prompts", str(tmp_path / "prompts.jsonl"), "--max-new-tokens", "12"]
    flags += ["--n", "2", "--batch-size", "4", "--keep", "best", "--reward", reward, "--reward-seconds", "0.2"]
    assert main(["generate", *flags, "--output", str(output)]) == 2
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [prompt for prompt in PROMPTS for _ in range(2)]
    assert [(row["response"], row["finished"]) for row in rows] == answers(tiny_model, PROMPTS, n=2)
    assert rows[0].keys() == {"prompt", "response", "finished"}
    said = capsys.readouterr().err.splitlines()[-1]
    assert "took longer than 0.2 s for 6 responses; --reward-seconds allows more" in said
    assert said.endswith(f". The 6 responses are in {output}, all without scores")
    output.unlink()
    monkeypatch.setattr(generate, "scored", interrupted)
    assert main(["generate", *flags, "--output", str(output)]) == 130
    assert [json.loads(line) for line in output.read_text().splitlines()] == rows


def test_scores_are_printed_below_their_responses(tiny_model, capsys):
    flags = ["--model", str(tiny_model), "--prompts", "the cat sees", "--max-new-tokens", "12", "--seed", "3"]
    flags += ["--reward", "tests.commands.rewards:dogs"]
    assert main(["generate", *flags]) == 0
    [(response, _)] = answers(tiny_model, ["the cat sees"], seed=3)
    words = response.split()
    assert capsys.readouterr().out == f"{response}\n(score {words.count('dog') / len(words):.6g})\n"
    assert main(["generate", *flags, "--n", "2"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("> the cat sees\n") == shown.count("\n(score ") == 2


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


def interrupted(*_):
    raise KeyboardInterrupt


def test_responses_are_scored_some_at_a_time_and_those_to_one_prompt_together(monkeypatch):
    calls, rows = [], [{"prompt": f"{i // 3}", "response": f"{i}", "finished": True} for i in range(12)]

    def rewards(prompts, responses, columns):
        calls.append(len(prompts))
        assert columns == {"answer": prompts, "finished": [True] * len(prompts)}
        return [float(said) for said in responses]

    monkeypatch.setattr(generate, "SCORED_TOGETHER", 8)
    found = generate.scored(rows, rewards, {"answer": [row["prompt"] for row in rows]}, 3)
    assert calls == [6, 6] and [row["score"] for row in found] == list(range(12))
    generate.scored(rows, rewards, {"answer": [row["prompt"] for row in rows]}, 12)
    assert calls == [6, 6, 12]


def test_a_response_that_could_not_be_scored_is_found_by_its_number(monkeypatch):
    rows = [{"prompt": "?", "response": text, "finished": True} for text in ("a", "b", "c", "")]
    monkeypatch.setattr(generate, "SCORED_TOGETHER", 2)
    with pytest.raises(RewardError, match=r"for response 1: division by zero \(counted from response 2\)"):
        generate.scored(rows, Rewards("tests.commands.rewards:each"), {}, 1)


def test_samples_follow_from_the_seed(tiny_model):
    first, again, other = (answers(tiny_model, PROMPTS, seed=seed) for seed in (0, 0, 1))
    assert first == again != other


def test_an_answer_stops_at_its_terminator_and_says_so(tiny_model, tmp_path):
    assert answers(drawing(2, tiny_model, tmp_path), ["the cat sees"], temperature=0.0) == [("", True)]
    [(text, finished)] = answers(tiny_model, ["the cat sees"], temperature=0.0, max_new_tokens=3)
    assert text and not finished


@pytest.mark.parametrize("stop", ["<s>", "<s> <s>"])
def test_a_stop_text_may_be_or_hold_a_special_token(stop, tiny_model, tmp_path):
    """Special tokens are no part of a response's text, where stop texts were looked for."""
    folder, output = drawing(1, tiny_model, tmp_path), tmp_path / "made.jsonl"
    flags = ["--model", str(folder), "--prompts", "the cat sees", "--temperature", "0", "--max-new-tokens", "12"]
    assert main(["generate", *flags, "--stop", stop, "--output", str(output)]) == 0
    assert json.loads(output.read_text()) == {"prompt": "the cat sees", "response": "", "finished": True}
    if stop == "<s>":
        assert answers(folder, ["the cat sees"], temperature=0.0) == [("", False)]


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


def drawing(token, tiny_model, tmp_path):
    """The tiny model that draws one token behind the cat: its embedding points where the last hidden state does."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    hidden = _last_hidden(tiny_model, "the cat sees")
    weights["model.embed_tokens.weight"][token] = 100 * hidden / np.linalg.norm(hidden)
    save_file(weights, folder / "model.safetensors")
    return folder


def _last_hidden(folder, prompt):
    from flax import nnx

    config = huggingface.read_config(str(folder))
    model = nnx.merge(make_decoder(config)[0], load_params(str(folder), config))
    ids = huggingface.load_tokenizer(str(folder))(prompt)["input_ids"]
    return np.asarray(jax.device_get(model(jnp.array([ids]))[0, -1]))


def test_prompts_are_read_from_files_and_anything_else_is_the_prompt_itself(tmp_path):
    assert generate.read_rows("tell me of prompts")[0] == ["tell me of prompts"]
    assert generate.read_rows("\udcff of the command line")[0] == ["\ufffd of the command line"]
    path = tmp_path / "mixed.jsonl"
    path.write_text('{"prompt": "a"}\n{"other": "b"}\n')
    with pytest.raises(ValueError, match=r"mixed.jsonl, row 2: 'prompt' holds None"):
        generate.read_rows(str(path))[0]
    path.write_text('{"messages": [{"role": "user"}]}\n')
    with pytest.raises(ValueError, match=r"mixed.jsonl, row 1: 'content' is missing"):
        generate.read_rows(str(path))[0]


def test_a_value_is_a_name_of_files_if_it_looks_like_one_and_has_no_blank(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for prompt in ("Tell me about notes.txt", "either/or, he said", "Compare a.txt, b.txt", "notes", "e.g. x.md"):
        assert generate.read_rows(prompt)[0] == [prompt]
    for name in ("my notes.txt", "notes"):
        (tmp_path / name).write_text("a\nb\n")
    assert generate.read_rows("my notes.txt")[0] == ["a", "b"] and generate.read_rows("notes")[0] == ["notes"]
    for typo in ("note.txt", "note.txt:test", "note.txt*0.5", "my notes.txt,note.txt", "folder/notes", "3/4"):
        with pytest.raises(ValueError, match=r"does not exist|there is no such file"):
            generate.read_rows(typo)


def test_all_rows_of_all_files_are_prompts_unless_a_split_is_named(tmp_path):
    rows = [{"prompt": p, "split": "test" if p == "b" else "train"} for p in "abc"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.jsonl").write_text('{"prompt": "d", "answer": "e"}\n')
    found, columns = generate.read_rows(f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl")
    assert found == ["a", "b", "c", "d"]
    assert columns == {"split": ["train", "test", "train", None], "answer": [None, None, None, "e"]}
    assert generate.read_rows(f"{tmp_path}/a.jsonl:test")[0] == ["b"]
    with pytest.raises(ValueError, match="has no split 'held'"):
        generate.read_rows(f"{tmp_path}/a.jsonl:held")[0]
    (tmp_path / "b.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"b.jsonl is empty"):
        generate.read_rows(f"{tmp_path}/b.jsonl")[0]


def test_lines_of_a_text_end_with_a_newline_alone(tmp_path):
    (tmp_path / "lines.txt").write_bytes("a\u2028b\x0bc\r\n \nd\x85e".encode())
    assert generate.read_rows(str(tmp_path / "lines.txt"))[0] == ["a\u2028b\x0bc", "d\x85e"]
