"""`jaxalign generate`: prompts from a file or the command line, answers in a file or on the terminal."""

import functools
import io
import json
import shutil

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
from tests.rollout.answers import answers as rollout_answers
from tests.shared import TEMPLATE, on_one_device

PROMPTS = ["the cat sees", "a dog", "one red dog runs to the"]


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
    outputs = []
    for name in ("prompts.jsonl", "prompts.txt"):
        output = tmp_path / "made" / f"{name}.out"
        config = GenerateConfig(str(tiny_model), str(tmp_path / name), output, max_new_tokens=12, temperature=0.0)
        assert generate.main(config) == 0
        outputs.append([json.loads(line) for line in output.read_text().splitlines()])
    assert outputs[0] == outputs[1]
    assert [row["prompt"] for row in outputs[0]] == PROMPTS
    alone = [answers(tiny_model, [prompt], temperature=0.0)[0] for prompt in PROMPTS]
    assert [(row["response"], row["finished"]) for row in outputs[0]] == alone


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
    text = written.getvalue().decode("latin-1")
    assert text.startswith("> system: é\n> user: \\u4e00\n") and "\n\n> the cat\n" in text


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
