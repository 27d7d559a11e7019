"""Prompts that on-policy commands answer, and the errors of rows that hold none."""

import json
import logging

import pytest

from jaxalign.data.batches.plan import Plan
from jaxalign.data.sets import prompts


def load(tokenizer, tmp_path, rows, **options):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return prompts.load(str(path), tokenizer, **{"max_length": 8, "max_dropped": 0.0, **options})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"x": 3}, "row 2: 'prompt' holds None; it must be a text, or a list of messages"),
        ({"prompt": None}, "row 2: 'prompt' holds None"),
        ({"prompt": 3}, "row 2: 'prompt' holds 3"),
        ({"prompt": []}, r"row 2: 'prompt' holds \[\]"),
        ({"prompt": [{"role": "user"}]}, "row 2: 'content' is missing"),
        ({"prompt": [{"content": "a"}]}, "row 2: 'role' is missing"),
        ({"prompt": ["a"]}, r"row 2: \['a'\] is not a list of turns"),
    ],
)
def test_a_row_without_a_prompt_is_named(tokenizer, tmp_path, row, message):
    with pytest.raises(ValueError, match=f"prompts.jsonl, {message}"):
        load(tokenizer, tmp_path, [{"prompt": "a"}, row])


@pytest.mark.parametrize("prompt", ["a", [{"role": "user", "content": "a"}]])
def test_a_template_that_refuses_a_prompt_is_told_with_its_row(tokenizer, tmp_path, prompt):
    with pytest.raises(ValueError, match="row 1: the prompt is a conversation, but the tokenizer has no chat template"):
        load(tokenizer, tmp_path, [{"prompt": prompt}], as_chat=True)
    tokenizer.chat_template = "{{ raise_exception('no users') }}"
    with pytest.raises(ValueError, match="row 1: the chat template cannot render a conversation of user: no users"):
        load(tokenizer, tmp_path, [{"prompt": prompt}], as_chat=True)


def test_that_no_prompt_is_short_enough_is_told_even_where_all_may_be_dropped(tokenizer, tmp_path):
    rows = [{"prompt": "the cat"}, {"prompt": "a dog"}]
    with pytest.raises(
        ValueError, match=r"2 of 2 prompts have more than 1 .*; raise `max_length` or lower `max_new_tokens`$"
    ):
        load(tokenizer, tmp_path, rows, max_length=1, max_dropped=1.0)
    rows.append({"prompt": "a"})
    assert load(tokenizer, tmp_path, rows, max_length=1, max_dropped=1.0).ids == [(5,)]
    with pytest.raises(ValueError, match=r"2 of 3 prompts have .*, or allow it with `max_dropped`"):
        load(tokenizer, tmp_path, rows, max_length=1)


def read(row, **options):
    prompts_, raw, others = prompts.read([row], "d", **options)
    return prompts_[0], raw[0], others[0]


def test_an_instruction_is_asked_with_its_input_and_its_context():
    row = {"instruction": "Repeat the word:", "input": "cat", "answer": "cat"}
    question = "Repeat the word:\n\ncat"
    assert read(row) == (question, question, {"input": "cat", "answer": "cat"})
    assert read({"question": "who ?", "context": "a dog"})[0] == "who ?\n\na dog"


def test_a_system_text_and_a_history_stand_in_front_of_a_prompt():
    row = {"prompt": "p", "system": "s", "history": [["a", "b"]]}
    turns = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "p")]
    assert [(m["role"], m["content"]) for m in read(row)[0]] == turns
    spelled = [{"from": "human", "value": "p"}]
    prompt, raw, _ = read({"messages": spelled})
    assert raw == spelled and list(prompt) == [{"role": "user", "content": "p"}]


@pytest.mark.parametrize("name", ["context", "input", "images", "documents"])
def test_a_column_of_content_is_refused_unless_a_reward_reads_it(name):
    row = {"prompt": "p", name: ["x"]}
    with pytest.raises(
        ValueError, match=f"d, row 1: column '{name}' holds .*, which the format prompts in 'prompt' does"
    ):
        read(row)
    assert read(row, elsewhere=lambda column: column == name) == ("p", "p", {name: ["x"]})


def test_the_log_lists_the_columns_that_neither_the_prompt_nor_a_reward_reads(caplog):
    with caplog.at_level("INFO"):
        read(
            {"prompt": "p", "answer": "a", "source": "web", "thinking": "hm"},
            elsewhere=lambda column: column == "answer",
        )
    assert "d: nothing reads source, thinking" in caplog.text


ANSWERED = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sees a"}]


@pytest.mark.parametrize(
    ("last_turn", "end", "raw", "message"),
    [
        ("continue", "Assistant : sees a", ANSWERED, "goes on with"),
        ("drop", "the cat \n Assistant :", ANSWERED[:1], "does without"),
    ],
)
def test_a_last_turn_of_the_assistant_is_continued_or_dropped(
    chat_tokenizer, tmp_path, caplog, last_turn, end, raw, message
):
    with caplog.at_level(logging.INFO, "jaxalign"):
        loaded = load(chat_tokenizer, tmp_path, [{"messages": ANSWERED}], max_length=30, last_turn=last_turn)
    assert chat_tokenizer.decode(loaded.ids[0]).endswith(end) and loaded.raw == [raw]
    assert f"1 prompts end with a turn of the assistant, which the response {message}" in caplog.messages


def test_by_default_it_is_refused_with_its_row(chat_tokenizer, tmp_path):
    rows = [{"messages": ANSWERED[:1]}, {"messages": ANSWERED}]
    with pytest.raises(
        ValueError, match=r"row 2: the last turn of the prompt is the assistant's, .*`last_turn` continue"
    ):
        load(chat_tokenizer, tmp_path, rows, max_length=30)
    with pytest.raises(ValueError, match="row 1: all turns of the prompt are the assistant's"):
        load(chat_tokenizer, tmp_path, [{"messages": ANSWERED[1:]}], last_turn="drop")


TOOLS = [{"type": "function", "function": {"name": "lookup", "parameters": {}}}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "the cat", "tools": TOOLS},
        {"prompt": "the cat", "tools": json.dumps(TOOLS)},
        {"messages": [{"role": "user", "content": "the cat", "tools": TOOLS}]},
        {"conversations": [{"from": "human", "value": "the cat"}], "functions": TOOLS},
        {"question": "the cat", "tools": [TOOLS[0]["function"]]},
    ],
)
def test_tools_of_a_prompt_are_rendered(chat_tokenizer, tmp_path, row):
    chat_tokenizer.chat_template = (
        "{% for t in tools %}{{ t.function.name }} {% endfor %}" + chat_tokenizer.chat_template
    )
    [ids] = load(chat_tokenizer, tmp_path, [row], max_length=60).ids
    messages = [{"role": "user", "content": "the cat"}]
    options = {"tools": TOOLS, "add_generation_prompt": True}
    assert list(ids) == chat_tokenizer.apply_chat_template(messages, **options)["input_ids"]


def test_a_template_that_leaves_out_the_tools_of_a_prompt_is_told(chat_tokenizer, tmp_path):
    with pytest.raises(ValueError, match="row 1: the chat template leaves out the 'tools' of the conversation"):
        load(chat_tokenizer, tmp_path, [{"prompt": "a", "tools": TOOLS}], max_length=60)


def test_an_epoch_takes_prompts_of_several_files_by_their_weights(tokenizer, tmp_path):
    for name, word, count in (("a", "cat", 4), ("b", "dog", 12)):
        (tmp_path / f"{name}.jsonl").write_text((json.dumps({"prompt": word}) + "\n") * count)
    paths = [f"{tmp_path}/{name}.jsonl" for name in "ab"]
    for weights, expected in (("", 4), ("*0.75", 12)):
        spec = f"{paths[0]}{weights},{paths[1]}{weights and '*0.25'}"
        loaded = prompts.load(spec, tokenizer, max_length=8, max_dropped=0.0)
        batches = prompts.PromptBatches(loaded, Plan(batch_size=16, max_length=8, seed=0))
        assert sum(loaded.raw[i] == "cat" for i in batches[0]) == expected
