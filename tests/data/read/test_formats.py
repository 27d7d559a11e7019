"""Rows of every format in their normal form."""

import pytest

from jaxalign.data.read.formats import Conversation, PromptCompletion, Text, normalise, recognise


def turns(*contents, first="user"):
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return Conversation(tuple({"role": roles[i % 2], "content": c} for i, c in enumerate(contents)))


SHAREGPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
MESSAGES = [{"role": "user", "content": "a"}, {"tool_calls": None, "role": "assistant", "content": None}]
TOLD = {"role": "assistant", "content": "b"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"arguments": "{}"}}]}
OASST_TREE = {
    "message_tree_id": "t",
    "prompt": {
        "role": "prompter",
        "text": "why ?",
        "replies": [
            {"role": "assistant", "text": "worse", "rank": 1, "replies": []},
            {
                "role": "assistant",
                "text": "better",
                "rank": 0,
                "replies": [{"role": "prompter", "text": "and ?", "replies": []}],
            },
            {"role": "assistant", "text": "gone", "rank": None, "deleted": True},
        ],
    },
}


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("text", {"text": "x", "label": 1}, Text("x")),
        ("prompt+completion", {"prompt": "p", "completion": "c"}, PromptCompletion("p", "c")),
        ("FLAN", {"inputs": "p", "targets": "c"}, PromptCompletion("p", "c")),
        ("Alpaca", {"instruction": "do", "input": "", "output": "done"}, turns("do", "done")),
        ("Alpaca", {"instruction": "do", "input": "this", "output": "done"}, turns("do\n\nthis", "done")),
        ("Alpaca", {"instruction": "do", "output": "done"}, turns("do", "done")),
        ("Alpaca with response", {"instruction": "do", "input": " ", "response": "ok"}, turns("do", "ok")),
        ("Dolly", {"instruction": "do", "context": "this", "response": "ok"}, turns("do\n\nthis", "ok")),
        ("self-instruct", {"instruction": "do", "instances": [{"input": "x", "output": "y"}]}, turns("do\n\nx", "y")),
        ("question and answer", {"question": "q", "answer": "a"}, turns("q", "a")),
        ("chosen of a pair", {"prompt": "p", "chosen": "c", "rejected": "r"}, PromptCompletion("p", "c")),
        ("chosen of a pair", {"prompt": "a", "chosen": [MESSAGES[0], TOLD]}, turns("a", "b")),
        ("ShareGPT", {"conversations": SHAREGPT}, turns("a", "b")),
        ("messages", {"messages": MESSAGES}, turns("a", "")),
        ("OASST tree", OASST_TREE, turns("why ?", "better")),
        (
            "prompt+completion",
            {"prompt": [{"role": "user", "content": "p"}], "completion": [{"role": "assistant", "content": "c"}]},
            turns("p", "c"),
        ),
    ],
)
def test_a_row_is_recognised_by_its_columns_and_brought_to_normal_form(name, row, expected):
    form = recognise(row, where="rows")
    assert form.name == name
    assert normalise(form, row, where="rows, row 1") == expected


def test_unknown_columns_are_told_with_those_that_would_be_known():
    with pytest.raises(ValueError, match=r"rows.jsonl: columns body, title are no known format; known are messages"):
        recognise(["title", "body"], where="rows.jsonl")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "narrator", "content": "x"}]}, "row 3: role 'narrator' is not one of human, user"),
        ({"messages": [{"content": "x"}]}, "row 3: 'role' is missing, which the format messages"),
        ({"messages": "hello"}, "row 3: 'hello' is not a list of turns"),
        ({"messages": [CALL]}, "row 3: a call of a tool: 'function': 'name' is absent; it must hold a text"),
        ({"instruction": "do", "instances": []}, "row 3: not a row of format self-instruct"),
    ],
)
def test_a_row_that_breaks_its_format_is_named(row, message):
    with pytest.raises(ValueError, match=message):
        normalise(recognise(row, where="d"), row, where="d, row 3")


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"text": 3}, "text"),
        ({"prompt": "p", "completion": 1.5}, "completion"),
        ({"instruction": "do", "output": ["x"]}, "output"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, "content"),
    ],
)
def test_a_column_that_should_hold_text_and_does_not_is_named(row, column):
    with pytest.raises(ValueError, match=f"row 2: column '{column}' holds"):
        normalise(recognise(row, where="d"), row, where="d, row 2")


def test_an_empty_cell_is_an_empty_text():
    row = {"prompt": "p", "completion": None}
    assert normalise(recognise(row, where="d"), row, where="d") == PromptCompletion("p", "")


def test_turns_that_call_tools_are_the_assistants_in_either_spelling():
    """LLaMA-Factory writes a call as JSON text in a turn of its own, OpenAI under a key of the assistant's turn."""
    call = {"type": "function", "function": {"name": "add", "arguments": {"x": 1, "y": 2}}}
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    turns_of_llama_factory = [
        {"from": "human", "value": "1 + 2 ?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"x": 1, "y": 2}}'},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "3 ."},
    ]
    turns_of_openai = [
        {"role": "user", "content": "1 + 2 ?"},
        {"role": "assistant", "tool_calls": [call | {"function": {"name": "add", "arguments": '{"x": 1, "y": 2}'}}]},
        {"role": "tool", "content": [{"type": "text", "text": "3"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "3"}, {"type": "text", "text": " ."}]},
    ]
    rows = [
        {"conversations": turns_of_llama_factory, "tools": '[{"name": "add", "parameters": {"type": "object"}}]'},
        {"messages": turns_of_openai, "tools": [tool]},
        {"messages": [{**turns_of_openai[0], "tools": [tool]}, *turns_of_openai[1:]]},
    ]
    expected = Conversation(
        (
            {"role": "user", "content": "1 + 2 ?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": "3 ."},
        ),
        (tool,),
    )
    assert [normalise(recognise(row, where="d"), row, where="d") for row in rows] == [expected] * 3


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"training": False}, {"loss": False}])
def test_a_turn_that_is_marked_so_is_context_only(mark):
    row = {"messages": [MESSAGES[0], {"role": "assistant", "content": "b", "thinking": "hm"} | mark]}
    answer = normalise(recognise(row, where="d"), row, where="d").messages[1]
    assert answer == {"role": "assistant", "content": "b", "reasoning_content": "hm", "learn": False}
    row["messages"][1] |= {name: not value for name, value in mark.items()}
    assert "learn" not in normalise(recognise(row, where="d"), row, where="d").messages[1]


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"role": "assistant", "content": "b", "weight": 0.5}, r"'weight' of a turn is 0\.5; a turn is learned \(1"),
        ({"role": "assistant", "content": "b", "train_detail": [{}]}, "a turn has 'train_detail', which is not read"),
        ({"role": "user", "content": "b", "train": True}, "only the assistant's turns are learned"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "'content' has a part 'image_url'; only parts of type"),
        ({"from": "function_call", "value": "add 1 and 2"}, "a turn that calls a tool is not JSON"),
        ({"role": "user", "content": "b", "thinking": "hm"}, "'thinking', which only the assistant's have"),
    ],
)
def test_a_turn_that_cannot_be_read_is_refused_by_its_key(turn, message):
    row = {"messages": [MESSAGES[0], turn]}
    with pytest.raises(ValueError, match=f"d, row 3: .*{message}"):
        normalise(recognise(row, where="d"), row, where="d, row 3")


def test_a_system_text_beside_messages_is_their_first_turn_and_must_not_differ_from_one():
    system = {"role": "system", "content": "be brief"}
    row = {"messages": [MESSAGES[0]], "system": "be brief"}
    expected = (system, MESSAGES[0])
    assert normalise(recognise(row, where="d"), row, where="d").messages == expected
    repeated = row | {"messages": [system, MESSAGES[0]]}
    assert normalise(recognise(row, where="d"), repeated, where="d").messages == expected
    with pytest.raises(ValueError, match="d: 'system' differs from the messages' own system turn"):
        normalise(recognise(row, where="d"), repeated | {"system": "be kind"}, where="d")
