"""Rows of every format in their normal form."""

import pytest

from jaxalign.data.read.formats import Conversation, PromptCompletion, Text, normalise, recognise


def turns(*contents, first="user"):
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return Conversation(tuple({"role": roles[i % 2], "content": c} for i, c in enumerate(contents)))


SHAREGPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
MESSAGES = [{"role": "user", "content": "a"}, {"tool_calls": None, "role": "assistant", "content": None}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
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
        ("chosen of a pair", {"prompt": "p", "chosen": "c", "rejected": "r"}, turns("p", "c")),
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
        ({"messages": [CALL]}, "row 3: a turn calls a tool in `tool_calls` .*; write the call into its `content`"),
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
    with pytest.raises(ValueError, match=f"row 2: column {column} holds"):
        normalise(recognise(row, where="d"), row, where="d, row 2")


def test_an_empty_cell_is_an_empty_text():
    row = {"prompt": "p", "completion": None}
    assert normalise(recognise(row, where="d"), row, where="d") == PromptCompletion("p", "")
