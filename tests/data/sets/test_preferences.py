"""Groups of responses from files of feedback; what cannot be compared is counted with its reason."""

import gzip
import json

import numpy as np
import pytest

from jaxalign.data.read.feedback_formats import PAIRS, RANKED, RATED
from jaxalign.data.sets import preferences
from jaxalign.data.sets.supervised import Options
from jaxalign.models.files.huggingface import load_tokenizer


def load(tmp_path, tiny_model, rows, *, kind=PAIRS, ties=False, most_responses=9, **options):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = Options(terminators=(2,), **{"max_length": 16, "max_dropped": 0.9, **options})
    tokenizer = load_tokenizer(str(tiny_model))
    return preferences.load(str(path), tokenizer, options, kind=kind, ties=ties, most_responses=most_responses)


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
    rows = [pair | {"tie": True, "preference": None}, pair | {"tie": None, "preference": 0.75}, pair]
    columns = load(tmp_path, tiny_model, rows, eval_share=0.0, ties=True).responses.columns
    assert columns["tie"].tolist() == [True, False, False] and columns["tie"].dtype == bool
    assert columns["preference"].tolist() == [1.0, 0.75, 1.0] and "margin" not in columns
    with pytest.raises(ValueError, match=r"preference is 1\.5, not a probability"):
        load(tmp_path, tiny_model, [pair | {"preference": 1.5}])


def test_ranks_of_a_ranking_are_a_column_where_some_are_equal(tmp_path, tiny_model):
    rows = [
        {"prompt": "the ?", "responses": ["cat", "dog", "red"], "ranks": [2, 1, 2]},
        {"prompt": "the ?", "responses": ["cat", "dog"], "ranks": [1, 2]},
    ]
    data = load(tmp_path, tiny_model, rows, kind=RANKED, eval_share=0.0)
    ranks = data.responses.columns["ranks"]
    assert ranks[0, :3].tolist() == [0, 1, 1] and ranks[1, :2].tolist() == [0, 1] and ranks.shape == (2, 9)


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("margin", {"margin": float("nan")}),
        ("tie", {"tie": float("nan")}),
        ("score_chosen", {"score_chosen": float("inf"), "score_rejected": 1.0}),
        ("a value in 'scores'", {"responses": ["cat", "dog"], "scores": [1.0, float("nan")]}),
    ],
)
def test_a_number_that_is_not_finite_is_refused_with_its_row(tmp_path, tiny_model, name, columns):
    pair = {} if "responses" in columns else {"chosen": "a dog", "rejected": "red"}
    with pytest.raises(
        ValueError, match=f"row 1: {name} is (nan|inf), not a finite number in float32; give one, or leave"
    ):
        load(tmp_path, tiny_model, [{"prompt": "the ?", **pair, **columns}])


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
    responses = load(tmp_path, tiny_model, [TIED_PAIR], ties=True).responses
    assert responses.columns["tie"].tolist() == [True]


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
    logged = " ".join(record.getMessage() for record in caplog.records)
    for reason in ("1 x empty response", "1 x the responses are the same, once cut", "1 x the prompt fills the window"):
        assert reason in logged
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

    def read(row, **options):
        return load(tmp_path, tiny_model, [row], eval_share=0.0, **options).responses

    ranked, unranked = (read(row, kind=RANKED, most_responses=3) for row in (ranking | {"ranks": [1, 1, 2]}, ranking))
    assert preferences.joined([ranked, unranked]).columns["ranks"].tolist() == [[0, 0, 1], [0, 1, 2]]
    judged = read(pair | {"margin": 2, "preference": 0.75, "tie": True}, ties=True)
    silent = read(pair, ties=True)
    columns = preferences.joined([silent, judged]).columns
    assert {name: values.tolist() for name, values in columns.items()} == {
        "margin": [0, 2],
        "preference": [1, 0.75],
        "tie": [False, True],
    }
    assert set(preferences.joined([silent, judged.take([])]).columns) == {"margin", "preference", "tie"}


def prompts_of(tiny_model, responses):
    return [decoded(tiny_model, responses, i, 0)[0] for i in range(len(responses))]


def test_a_response_is_held_out_with_all_its_pairs(tmp_path, tiny_model):
    words = ["cat", "dog", "red", "blue", "one", "two", "a"]
    rows = [{"prompt": f"{a} {b} ?", "responses": ["cat", "dog", "red"]} for a in words for b in words[:3]]
    data = load(tmp_path, tiny_model, rows, kind=PAIRS, eval_share=0.2)
    held_out, train = (prompts_of(tiny_model, part) for part in (data.held_out, data.responses))
    assert len(held_out) == 12 and not set(held_out) & set(train)
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
    mismatched = preferences.mismatched(data.responses, seed=seed)
    for i in range(len(mismatched)):
        prompt, response = decoded(tiny_model, mismatched, i, 0)
        assert prompt == decoded(tiny_model, data.responses, i, 0)[0]
        assert prompt.split()[-2] != response.split()[0]
    one = data.responses.take(range(4, len(rows) * 2))
    assert len(preferences.mismatched(one, seed=seed)) == 10


def test_a_response_without_prompt_is_mismatched_whole(tmp_path, tokenizer):
    """The first token of a sequence is never learned; of an empty prompt it is the response's, not the prompt's."""
    rows = [{"prompt": "", "completion": text, "label": True} for text in ("cat runs to", "dog sees a red")]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = Options(max_length=16, terminators=(2,), eval_share=0.0)
    assert tokenizer("a")["input_ids"][:1] != [tokenizer.bos_token_id]
    responses = preferences.load(str(path), tokenizer, options, kind=RATED).responses
    halves = preferences.joined([responses.take([0]), responses.take([1])])
    for part in (responses, halves):
        other = preferences.mismatched(part, seed=0)
        texts = [tokenizer.decode(other.examples[i][0].tolist()).split() for i in range(2)]
        assert texts[0][:4] == ["dog", "sees", "a", "red"] and texts[1][:3] == ["cat", "runs", "to"]
        assert [other.examples[i][1].sum() for i in range(2)] == [len(t) - 1 for t in texts]


def test_feedback_on_a_turn_that_is_not_learned_is_refused(tmp_path, chat_tokenizer):
    answers = [[{"role": "assistant", "content": text, "weight": 0}] for text in ("a dog", "red")]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "the cat ?", "chosen": answers[0], "rejected": answers[1]}))
    options = Options(max_length=32, terminators=(2,))
    with pytest.raises(ValueError, match="row 1: the last turn of a response is marked as not learned"):
        preferences.load(str(path), chat_tokenizer, options, kind=PAIRS)
