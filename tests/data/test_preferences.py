"""Feedback in every format becomes groups of responses; what cannot be compared is counted, and says why."""

import gzip
import json

import numpy as np
import pytest

from jaxalign.data.read import feedback_formats
from jaxalign.data.read.feedback_formats import PAIRS, RANKED, RATED, as_kind, recognise
from jaxalign.data.read.formats import Conversation, PromptCompletion
from jaxalign.data.sets import preferences
from jaxalign.data.sets.supervised import Options
from jaxalign.models.files.huggingface import load_tokenizer

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
    label = feedback_formats.Group((PromptCompletion("p", "y"),), label=True)
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


def load(tmp_path, tiny_model, rows, *, kind=PAIRS, **more):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = {name: more.pop(name) for name in ("as_chat", "ties", "most_responses") if name in more}
    options = Options(max_length=more.pop("max_length", 16), terminators=(2,), **{"max_dropped": 0.9, **more})
    return preferences.load(str(path), load_tokenizer(str(tiny_model)), options, kind=kind, **asked)


def decoded(tiny_model, responses, group, k):
    ids, mask = responses.examples[int(responses.groups[group, k])]
    tokenizer = load_tokenizer(str(tiny_model))
    return tokenizer.decode(ids[~mask].tolist()), tokenizer.decode(ids[mask].tolist())


def test_a_pair_shares_its_prompt_and_each_response_ends_once(tmp_path, tiny_model):
    data = load(tmp_path, tiny_model, [{"prompt": "the cat ?", "chosen": "a dog", "rejected": "red", "margin": 1.5}])
    responses = data.responses
    first, second = (decoded(tiny_model, responses, 0, k) for k in (0, 1))
    assert first[0] == second[0] and "the cat" in first[0]
    assert first[1].split() == ["a", "dog", "</s>"] and second[1].split() == ["red", "</s>"]
    assert responses.columns["margin"].tolist() == [1.5]


def test_ties_and_probabilities_are_columns_as_soon_as_one_pair_has_them(tmp_path, tiny_model):
    pair = {"prompt": "the cat ?", "chosen": "a dog", "rejected": "red"}
    told = [pair | {"tie": True, "preference": None}, pair | {"tie": None, "preference": 0.75}, pair]
    columns = load(tmp_path, tiny_model, told, eval_share=0.0, ties=True).responses.columns
    assert columns["tie"].tolist() == [True, False, False] and columns["tie"].dtype == bool
    assert columns["preference"].tolist() == [1.0, 0.75, 1.0] and "margin" not in columns
    with pytest.raises(ValueError, match=r"preference is 1\.5, not a probability"):
        load(tmp_path, tiny_model, [pair | {"preference": 1.5}])


def test_ranks_of_a_ranking_are_a_column_where_some_are_equal(tmp_path, tiny_model):
    rows = [
        {"prompt": "the ?", "responses": ["cat", "dog", "red"], "ranks": [2, 1, 2]},
        {"prompt": "the ?", "responses": ["cat", "dog"], "ranks": [1, 2]},
    ]
    data = load(tmp_path, tiny_model, rows, kind=feedback_formats.RANKED, eval_share=0.0)
    ranks = data.responses.columns["ranks"]
    assert ranks[0, :3].tolist() == [0, 1, 1] and ranks[1, :2].tolist() == [0, 1] and ranks.shape == (2, 9)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("margin", {"margin": float("nan")}),
        ("tie", {"tie": float("nan")}),
        ("score_chosen", {"score_chosen": float("inf"), "score_rejected": 1.0}),
        ("a rank or score", {"responses": ["cat", "dog"], "scores": [1.0, float("nan")]}),
    ],
)
def test_a_number_that_is_not_finite_is_refused_with_its_row(tmp_path, tiny_model, name, more):
    pair = {} if "responses" in more else {"chosen": "a dog", "rejected": "red"}
    with pytest.raises(ValueError, match=f"row 1: {name} is (nan|inf), not a finite number; give one, or leave"):
        load(tmp_path, tiny_model, [{"prompt": "the ?", **pair, **more}])


ONE_RESPONSE = {"prompt": "the ?", "responses": ["cat"]}
EQUAL_RANKS = {"prompt": "the ?", "responses": ["cat", "dog"], "ranks": [1, 1]}
TIED_PAIR = {"prompt": "the ?", "chosen": "cat", "rejected": "dog", "tie": True}


@pytest.mark.parametrize("kind", [PAIRS, RANKED, RATED])
@pytest.mark.parametrize("row", [ONE_RESPONSE, EQUAL_RANKS, TIED_PAIR])
def test_where_no_response_is_better_nothing_is_learned_and_the_row_is_counted(tmp_path, tiny_model, kind, row):
    pair = {"prompt": "the ?", "chosen": "one", "rejected": "two"}
    better = pair if "chosen" in row else {"prompt": "the ?", "responses": ["one", "two"]}
    data = load(tmp_path, tiny_model, [better, row], kind=kind, eval_share=0.0)
    assert len(data.responses) == {PAIRS: 1, RANKED: 1, RATED: 2}[kind]
    with pytest.raises(
        ValueError, match=r"1 of 1 groups .* cannot be compared: 1 x no response is better than another"
    ):
        load(tmp_path, tiny_model, [row], kind=kind)


def test_a_ranking_whose_kept_responses_are_all_equal_is_dropped(tmp_path, tiny_model):
    row = {"prompt": "the ?", "responses": ["cat", "dog", "red"], "ranks": [1, 1, 2]}
    assert len(load(tmp_path, tiny_model, [row], kind=RANKED).responses) == 1
    with pytest.raises(ValueError, match="1 x no response is better than another among the first 2"):
        load(tmp_path, tiny_model, [row], kind=RANKED, most_responses=2)


def test_a_tied_pair_is_kept_for_a_loss_that_asks_for_ties(tmp_path, tiny_model):
    kept = load(tmp_path, tiny_model, [TIED_PAIR], ties=True).responses
    assert kept.columns["tie"].tolist() == [True]


def test_what_cannot_be_compared_is_dropped_counted_and_named(tmp_path, tiny_model, caplog):
    long = " ".join(["cat"] * 20)
    rows = [
        {"prompt": "the", "chosen": "cat", "rejected": "dog"},
        {"prompt": "the", "chosen": "cat", "rejected": "  "},
        {"prompt": "the", "chosen": f"{long} red", "rejected": f"{long} blue"},
        {"prompt": long, "chosen": "cat", "rejected": "dog"},
    ]
    data = load(tmp_path, tiny_model, rows)
    assert len(data.responses) == 1
    said = " ".join(record.getMessage() for record in caplog.records)
    for reason in ("1 x empty response", "1 x the responses are the same, once cut", "1 x the prompt fills the window"):
        assert reason in said
    with pytest.raises(ValueError, match=r"3 of 4 groups of responses cannot be compared: .* more than 10%"):
        load(tmp_path, tiny_model, rows, max_dropped=0.1)


def test_dialogues_that_part_before_their_last_turn_answer_different_prompts(tmp_path, tiny_model, caplog):
    tokenizer = load_tokenizer(str(tiny_model))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }} : {{ m.content }} "
        "{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant : {% endif %}"
    )
    talk = "\n\nHuman: the cat ?\n\nAssistant: a dog\n\nHuman: one ?\n\nAssistant: "
    rows = [
        {"chosen": talk + "red", "rejected": talk + "blue"},
        {"chosen": talk + "red", "rejected": talk.replace("a dog", "two") + "blue"},
    ]
    path = tmp_path / "hh.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    options = Options(max_length=64, terminators=(2,), max_dropped=0.9)
    data = preferences.load(str(path), tokenizer, options, kind=PAIRS)
    assert len(data.responses) == 1 and decoded(tiny_model, data.responses, 0, 0)[1].split() == ["red", "</s>"]
    assert "1 x the responses answer different prompts" in caplog.text


def test_rankings_of_unequal_size_leave_places_empty(tmp_path, tiny_model):
    rows = [
        {"prompt": "the", "responses": ["cat", "dog", "red"]},
        {"prompt": "a", "responses": ["blue", "one"]},
    ]
    data = load(tmp_path, tiny_model, rows, kind=RANKED)
    assert (data.responses.groups >= 0).sum(axis=1).tolist() == [3, 2]
    assert data.responses.groups.shape == (2, 9)


def test_held_out_groups_are_a_seeded_share_and_sets_join_with_their_examples(tmp_path, tiny_model):
    rows = [{"prompt": "the", "chosen": "cat " * (i % 3 + 1), "rejected": "dog " * (i % 4 + 1)} for i in range(20)]
    path, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for file in (path, other):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = Options(max_length=16, terminators=(2,), eval_share=0.25)
    data = preferences.load(f"{path},{other}", load_tokenizer(str(tiny_model)), options, kind=PAIRS)
    assert len(data.responses) == 30 and len(data.held_out) == 10
    assert data.train.sizes == (15, 15)
    lengths = np.concatenate([data.responses.lengths, data.held_out.lengths])
    assert sorted(map(tuple, lengths)) == sorted([(1 + i % 3 + 2, 1 + i % 4 + 2) for i in range(20)] * 2)


def test_sets_join_with_what_any_of_them_says_and_what_the_silence_of_the_others_means(tmp_path, tiny_model):
    ranking = {"prompt": "the ?", "responses": ["cat", "dog", "red"]}
    pair = {"prompt": "the ?", "chosen": "a", "rejected": "b"}
    read = lambda rows, **more: load(tmp_path, tiny_model, rows, eval_share=0.0, **more).responses  # noqa: E731
    told, silent = (read([ranking | more], kind=RANKED, most_responses=3) for more in ({"ranks": [1, 1, 2]}, {}))
    assert preferences.joined([told, silent]).columns["ranks"].tolist() == [[0, 0, 1], [0, 1, 2]]
    told, silent = (read([pair | more], ties=True) for more in ({"margin": 2, "preference": 0.75, "tie": True}, {}))
    columns = preferences.joined([silent, told]).columns
    assert {name: values.tolist() for name, values in columns.items()} == {
        "margin": [0, 2],
        "preference": [1, 0.75],
        "tie": [False, True],
    }
    assert set(preferences.joined([silent, told.take([])]).columns) == {"margin", "preference", "tie"}


def prompts_of(tiny_model, responses):
    return [decoded(tiny_model, responses, i, 0)[0] for i in range(len(responses))]


def test_a_response_is_held_out_with_all_its_pairs(tmp_path, tiny_model):
    words = ["cat", "dog", "red", "blue", "one", "two", "a"]
    rows = [{"prompt": f"{a} {b} ?", "responses": ["cat", "dog", "red"]} for a in words for b in words[:3]]
    data = load(tmp_path, tiny_model, rows, kind=PAIRS, eval_share=0.2)
    held, kept = (prompts_of(tiny_model, part) for part in (data.held_out, data.responses))
    assert len(held) == 12 and not set(held) & set(kept)
    few = load(tmp_path, tiny_model, rows[:2] * 5, kind=PAIRS, eval_share=0.05)
    assert len(set(prompts_of(tiny_model, few.held_out))) == len(set(prompts_of(tiny_model, few.responses))) == 1
    one = load(tmp_path, tiny_model, rows[:1] * 5, kind=PAIRS, eval_share=0.2)
    assert len(one.held_out) == 3


def test_of_pairs_that_share_a_prompt_alone_no_more_than_the_share_is_held_out(tmp_path, tiny_model):
    words = ["cat", "dog", "red", "blue", "one"]
    rows = [{"prompt": "the ?", "chosen": f"{a} {b}", "rejected": f"{a} {b} to"} for a in words for b in words]
    data = load(tmp_path, tiny_model, rows, kind=PAIRS, eval_share=0.2)
    assert (len(data.held_out), len(data.responses)) == (5, 20)


def test_responses_that_a_third_links_have_one_number(tmp_path, tiny_model):
    pairs = [("cat", "dog"), ("red", "blue"), ("dog", "one"), ("two", "a"), ("one", "blue")]
    rows = [{"prompt": "the ?", "chosen": a, "rejected": b} for a, b in pairs]
    data = load(tmp_path, tiny_model, rows, kind=PAIRS, eval_share=0.0)
    assert preferences.response_numbers(data.responses).tolist() == [0, 0, 0, 1, 0]


@pytest.mark.parametrize("seed", range(4))
def test_a_mismatched_response_answered_another_prompt_where_there_is_one(tmp_path, tiny_model, seed):
    """Each prompt's responses name it, as in the halves of a pair."""
    rows = [{"prompt": f"the {word} ?", "chosen": f"{word} a", "rejected": f"{word} b"} for word in ("cat", "dog")]
    rows += [{"prompt": "the red ?", "chosen": "red " * i, "rejected": "red blue"} for i in range(1, 6)]
    data = load(tmp_path, tiny_model, rows, kind=RATED, eval_share=0.0)
    found = preferences.mismatched(data.responses, seed=seed)
    for i in range(len(found)):
        prompt, response = decoded(tiny_model, found, i, 0)
        assert prompt == decoded(tiny_model, data.responses, i, 0)[0]
        assert prompt.split()[-2] != response.split()[0]
    one = data.responses.take(range(4, len(rows) * 2))
    assert len(preferences.mismatched(one, seed=seed)) == 10


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
    from jaxalign.data.read import sources

    rows = sources.load(sources.parse(str(shared_data / f"{name}.jsonl.gz"))[0]).rows
    form = recognise(rows[0].keys(), where=name)
    found = [group for row in rows for group in as_kind(form.convert(row, True), kind)]
    assert len(found) >= groups if kind == RANKED else len(found) == groups
    assert all(group.sequences for group in found)
