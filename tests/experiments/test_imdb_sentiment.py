"""The sentiment experiments: cutting, scoring, pairing and measuring, and a smoke run on the real reviews."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "experiments"))
import dpo_imdb_sentiment
import imdb_frontier
import imdb_scorer
from imdb_frontier import Point, gains, summary
from imdb_sentiment import LENGTH, QUICK, Sample, feedback_rows, pieces, prompts_of, usable

GOOD, BAD = "a great film .", "an awful film ."


def point(beta, step, score, kl):
    return Point("dpo", beta, step, score, 0.01, 0.2, kl, 0.1, 30.0, 1.0, 0.5)


def test_a_piece_is_whole_sentences_and_a_sentence_that_is_too_long_or_alone_too_short_is_left_out():
    six, seven, thirty = "One two three four five six.", "So it was a very GOOD one!", " ".join(["word"] * 30) + "."
    text = f"{six}<br /><br />{seven} {thirty} {six}"
    assert pieces(text) == ["one two three four five six. so it was a very good one!"]
    assert pieces(" ".join([six] * 5)) == [" ".join([six.lower()] * 4)]  # 24 words; the fifth stays alone


def test_at_the_scorer_s_optimum_the_mean_probability_is_the_share_of_positive_texts():
    texts, labels = [GOOD, GOOD, BAD, "film", "great film", BAD] * 3, np.array([1, 1, 0, 1, 0, 0] * 3)
    scorer = imdb_scorer.fit(texts, labels, l2=1e-2)
    np.testing.assert_allclose(scorer(texts).mean(), 0.5, atol=1e-4)  # the bias has no penalty
    assert scorer([GOOD])[0] > 0.5 > scorer([BAD])[0]
    assert scorer.accuracy([GOOD, BAD], np.array([1, 1])) == 0.5


def test_saying_a_word_twice_or_in_capitals_or_saying_an_unknown_one_changes_no_score():
    scorer = imdb_scorer.Scorer({"great": 0, "awful": 1}, np.array([2.0, -3.0]), 0.5)
    probability = scorer(["GREAT, great!", "great awful", "unheard of"])
    np.testing.assert_allclose(np.log(probability / (1 - probability)), [2.5, -0.5, 0.5])


def test_pairs_are_best_and_worst_of_a_prompt_and_ratings_are_by_the_median_of_all_usable_samples():
    prompts = ["p", "p", "p", "q", "q", "r"]
    samples = [Sample([], True, f" {name}") for name in "abcdef"]
    scores, is_usable = np.array([0.2, 0.9, 0.6, 0.4, 0.99, 0.7]), np.array([True, True, True, True, False, True])
    pairs, rated = feedback_rows(prompts, samples, scores, is_usable)
    assert pairs == [{"prompt": "p", "chosen": " b", "rejected": " a"}]  # q and r have one sample each to compare
    assert {row["completion"]: row["label"] for row in rated} == {
        " a": False, " b": True, " c": False, " d": False, " f": True,
    }  # fmt: skip
    with pytest.raises(ValueError, match="train the reference longer"):
        feedback_rows(prompts, samples, scores, np.zeros(6, bool))


def test_a_row_holds_the_terminator_inside_its_mask_only_if_it_was_drawn():
    tokens, mask = imdb_frontier.rows_of([[1, 5, 6], [1, 7]], [Sample([8, 9], True, ""), Sample([8], False, "")], 2)
    assert tokens.shape == mask.shape == (2, LENGTH)
    assert tokens[0, :6].tolist() == [1, 5, 6, 8, 9, 2] and np.flatnonzero(mask[0]).tolist() == [3, 4, 5]
    assert tokens[1, :4].tolist() == [1, 7, 8, 0] and np.flatnonzero(mask[1]).tolist() == [2]


def test_the_gain_is_counted_in_standard_deviations_and_the_summary_ends_at_ten_nats():
    points = [point(0.0, 0, 0.5, 0.0), point(0.1, 1, 0.6, 4.0), point(0.1, 2, 0.9, 11.0), point(1.0, 1, 0.75, 9.9)]
    np.testing.assert_allclose([gain for gain, _ in gains(points)], [0.5, 2.0, 1.25])
    assert [text.rsplit(" ", 2)[-2] for text in summary(points).splitlines()[1:]] == ["+0.50", "+1.25"]


def test_without_matplotlib_the_program_ends_before_any_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(sys, "argv", ["dpo", "no-such-folder"])
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        dpo_imdb_sentiment.main()


def test_the_quick_run_trains_a_reference_learns_from_its_samples_and_draws_the_frontier(
    shared_data, tmp_path, monkeypatch
):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "argv", ["dpo", str(shared_data), "--output", str(tmp_path), "--quick"])
    assert dpo_imdb_sentiment.main() == 0
    ref, trained = imdb_frontier.read_points(tmp_path)["dpo"]
    assert ref.kl == ref.kl_se == 0.0  # the same function reads both models
    assert trained.step == QUICK.steps and trained.kl > 0  # it has moved
    assert 0.2 < ref.score < 0.8 and ref.ended > 0.3
    assert (tmp_path / "imdb_frontier.png").read_bytes().startswith(b"\x89PNG")

    from jaxalign.models.files.huggingface import load_tokenizer

    tokenizer = load_tokenizer(str(tmp_path / "sft" / "final"))
    pairs, rated = (
        [json.loads(row) for row in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("pairs", "rated")
    )
    texts = {row["completion"] for row in rated}
    assert {p[side] for p in pairs for side in ("chosen", "rejected")} <= texts
    assert all(usable(Sample(tokenizer(t, add_special_tokens=False)["input_ids"], True, t), tokenizer) for t in texts)
    assert abs(np.mean([row["label"] for row in rated]) - 0.5) < 0.1
    openings = {p["prompt"] for p in rated}
    assert len(openings) <= QUICK.prompts and all(2 <= len(tokenizer(o)["input_ids"]) - 1 <= 8 for o in openings)
    with pytest.raises(ValueError, match="read more reviews"):
        prompts_of([], tokenizer, 1)
