"""Feedback in every format becomes groups of responses, best first, of the kind that a method learns from."""

from decimal import Decimal

import pytest

from jaxalign.data.read import sources
from jaxalign.data.read.feedback_formats import PAIRS, RANKED, RATED, Group, as_kind, number_in, recognise
from jaxalign.data.read.formats import Conversation, PromptCompletion, normalise

USER, YES, NO = ({"role": r, "content": c} for r, c in (("user", "p"), ("assistant", "y"), ("assistant", "n")))
HH = "\n\nHuman: a ?\n\nAssistant: b\n\nHuman: c ?\n\nAssistant: "
TREE = {
    "message_tree_id": 1,
    "prompt": {
        "role": "prompter",
        "text": "q",
        "replies": [
            {"role": "assistant", "text": "second", "rank": 1, "replies": []},
            {"role": "assistant", "text": "best", "rank": 0, "replies": []},
            {"role": "assistant", "text": "worst", "rank": 2, "replies": []},
        ],
    },
}
ROWS = [
    ("prompt with a pair", {"prompt": "p", "chosen": "y", "rejected": "n"}, [("y", "n")]),
    ("prompt with a pair", {"prompt": [USER], "chosen": [YES], "rejected": [NO]}, [("y", "n")]),
    ("prompt with a pair", {"prompt": "p", "chosen": [USER, YES], "rejected": [USER, NO]}, [("y", "n")]),
    (
        "ShareGPT pair",
        {
            "conversations": [{"from": "human", "value": "p"}],
            "chosen": {"from": "gpt", "value": "y"},
            "rejected": {"from": "gpt", "value": "n"},
        },
        [("y", "n")],
    ),
    ("Alpaca pair", {"instruction": "p", "input": "", "output": "y", "chosen": "y", "rejected": "n"}, [("y", "n")]),
    ("question with a pair", {"system": "s", "question": "p", "chosen": "y", "rejected": "n"}, [("y", "n")]),
    ("pair of dialogues", {"chosen": HH + "y", "rejected": HH + "n"}, [("y", "n")]),
    ("pair of dialogues", {"chosen": [USER, YES], "rejected": [USER, NO]}, [("y", "n")]),
    ("OASST tree", TREE, [("best", "second", "worst")]),
    ("prompt with ranked responses", {"prompt": "p", "responses": ["n", "y"], "scores": [0.1, 2.0]}, [("y", "n")]),
    ("prompt with ranked responses", {"prompt": "p", "responses": ["n", "y"], "ranks": [2, 1]}, [("y", "n")]),
    ("prompt+completion with a label", {"prompt": "p", "completion": "y", "label": True}, [("y",)]),
    ("prompt+completion, desirable", {"prompt": "p", "completion": "n", "desirable": False}, [("n",)]),
    ("messages with a label", {"messages": [USER, YES], "label": True}, [("y",)]),
]


def last(sequence):
    return sequence.completion if isinstance(sequence, PromptCompletion) else sequence.messages[-1]["content"]


@pytest.mark.parametrize(("name", "row", "expected"), ROWS)
def test_a_row_of_each_format_gives_its_responses_best_first(name, row, expected):
    form = recognise(row.keys(), where="here")
    groups = form.convert(row, False)
    assert form.name == name
    assert [tuple(map(last, group.sequences)) for group in groups] == expected


def test_texts_stay_texts_unless_they_are_said_to_be_a_conversation():
    row = {"prompt": "p", "chosen": "y", "rejected": "n"}
    form = recognise(row.keys(), where="here")
    assert form.convert(row, False)[0].sequences[0] == PromptCompletion("p", "y")
    assert form.convert(row, True)[0].sequences[0] == Conversation((USER, YES))


SYSTEM, CALL, RESULT = ({"role": r, "content": r} for r in ("system", "assistant", "tool"))


@pytest.mark.parametrize(
    ("prompt", "chosen", "whole"),
    [
        ("p", [SYSTEM, USER, YES], [SYSTEM, USER, YES]),
        ([SYSTEM, USER], [USER, YES], [SYSTEM, USER, YES]),
        ([USER], [CALL, RESULT, YES], [USER, CALL, RESULT, YES]),
        ("p", [CALL, RESULT, YES], [USER, CALL, RESULT, YES]),
        ([{"from": "human", "value": "p "}], [USER, CALL, USER, YES], [USER, CALL, USER, YES]),
    ],
)
def test_no_turn_of_a_pair_is_lost_whether_the_prompt_is_repeated_or_gone_on_from(prompt, chosen, whole):
    row = {"prompt": prompt, "chosen": chosen, "rejected": [*chosen[:-1], NO]}
    pair = recognise(row.keys(), where="here").convert(row, False)[0].sequences
    assert [list(sequence.messages) for sequence in pair] == [whole, [*whole[:-1], NO]]


def test_a_response_that_begins_with_another_prompt_is_refused():
    row = {"prompt": "q", "chosen": [USER, YES], "rejected": [USER, NO]}
    with pytest.raises(
        ValueError, match="of 2 turns begins with user and does not repeat the prompt; repeat all of it"
    ):
        recognise(row.keys(), where="here").convert(row, False)


def test_margins_come_from_their_column_or_from_scores():
    form = recognise(["prompt", "chosen", "rejected"], where="here")
    row = {"prompt": "p", "chosen": "y", "rejected": "n"}
    assert form.convert(row | {"margin": 2}, False)[0].opinions == {"margin": 2.0}
    assert form.convert(row | {"score_chosen": 8.0, "score_rejected": 5.5}, False)[0].opinions == {"margin": 2.5}
    assert form.convert(row, False)[0].opinions == {}


def test_a_ranking_of_three_is_three_pairs_and_a_pair_is_two_rated_responses():
    ranking = recognise(TREE.keys(), where="here").convert(TREE, False)
    pairs = [tuple(map(last, group.sequences)) for group in as_kind(ranking, PAIRS)]
    assert pairs == [("best", "second"), ("best", "worst"), ("second", "worst")]
    rated = [(last(group.sequences[0]), group.label) for group in as_kind(ranking, RATED)]
    assert rated == [("best", True), ("worst", False)]
    label = Group((PromptCompletion("p", "y"),), label=True)
    with pytest.raises(ValueError, match="responses with a label each are no pairs; `jaxalign kto` learns from them"):
        as_kind([label], PAIRS)


def test_equal_ranks_are_no_pair_and_reach_a_ranking_as_equal():
    row = {"prompt": "p", "responses": ["worst", "one", "other"], "scores": [1, 5, 5]}
    ranking = recognise(row.keys(), where="here").convert(row, False)
    assert ranking[0].ranks == (0, 0, 1)
    pairs = [tuple(s.completion for s in group.sequences) for group in as_kind(ranking, PAIRS)]
    assert pairs == [("one", "worst"), ("other", "worst")]
    tied = recognise(row.keys(), where="here").convert({**row, "scores": [2, 2, 2]}, False)
    assert as_kind(tied, PAIRS) == []


def test_columns_without_feedback_are_told_what_would_be():
    with pytest.raises(ValueError, match=r"columns text hold no feedback; known are messages\+label"):
        recognise(["text"], where="here")


@pytest.mark.parametrize(
    ("name", "kind", "groups"),
    [
        ("hh-rlhf/harmless-base.test", PAIRS, 2312),
        ("oasst/en_100_pairs", PAIRS, 754),
        ("llama-factory-demos/dpo_en_demo", PAIRS, 300),
        ("llms-from-scratch/instruction-data-with-preference", PAIRS, 1100),
        ("llama-factory-demos/kto_en_demo", RATED, 300),
        ("xstest/xstest_v2_completions", RATED, 2250),
        ("oasst/en_100_tree", RANKED, 100),
    ],
)
def test_real_feedback_is_read_whole(shared_data, name, kind, groups):
    rows = sources.load(sources.parse(str(shared_data / f"{name}.jsonl.gz"))[0]).rows
    form = recognise(rows[0].keys(), where=name)
    read = [group for row in rows for group in as_kind(form.convert(row, True), kind)]
    assert len(read) >= groups if kind == RANKED else len(read) == groups
    assert all(group.sequences for group in read)


def test_dialogues_without_a_template_are_texts_whose_common_beginning_is_the_prompt():
    """As TRL's extract_prompt has it: a space before the first difference belongs to the responses."""
    row = {"chosen": HH + "yes, a cat", "rejected": HH + "no"}
    form = recognise(row.keys(), where="here", dialogues_as_texts=True)
    assert form.convert(row, False)[0].sequences == (
        PromptCompletion(HH[:-1], " yes, a cat"),
        PromptCompletion(HH[:-1], " no"),
    )
    within = {"chosen": HH + "yes", "rejected": HH + "yes it is"}
    assert [s.completion for s in form.convert(within, False)[0].sequences] == ["s", "s it is"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"margin": 10**400}, "margin is beyond 1e30, not a finite number in float32"),
        ({"margin": 1e39}, r"margin is 1e\+39, not a finite number in float32"),
        ({"margin": "2"}, "margin is '2', not a number; give one, leave it out, or rename the column"),
        ({"score_chosen": 1e308, "score_rejected": -1e308}, r"score_chosen is 1e\+308, not a finite"),
        ({"score_chosen": 3e38, "score_rejected": -3e38}, r"score_chosen - score_rejected is 6e\+38, not a finite"),
        ({"responses": ["y", "n"], "scores": [10**400, 1]}, "a value in 'scores' is beyond 1e30, not a finite number"),
    ],
)
def test_numbers_that_float32_does_not_hold_are_refused_with_their_row(change, message):
    row = ({"prompt": "p"} if "scores" in change else {"prompt": "p", "chosen": "y", "rejected": "n"}) | change
    with pytest.raises(ValueError, match=f"d, row 1: {message}"):
        normalise(recognise(row, where="d"), row, False, where="d, row 1")


def test_a_margin_may_be_a_decimal_of_a_parquet_file():
    assert number_in("margin", Decimal("1.5")) == 1.5
    with pytest.raises(ValueError, match="not a finite number"):
        number_in("margin", Decimal("1e400"))
