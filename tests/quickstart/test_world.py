"""The tiny world: held-out questions are in no training data, and everything follows from the seed."""

from itertools import islice

import numpy as np
import pytest

from jaxalign.quickstart import world
from jaxalign.quickstart.judge import judge
from jaxalign.quickstart.tokenizer import vocabulary

ROWS = {
    "pretraining": lambda seed: world.pretraining_rows(seed, 2000),
    "instructions": lambda seed: world.instruction_rows(seed, 1000),
    "preferences": lambda seed: world.preference_rows(seed, 1000),
    "questions": lambda seed: world.question_rows(seed, 1000),
}


def texts(row):
    if "messages" in row:
        return [message["content"] for message in row["messages"]]
    return [value for value in row.values() if isinstance(value, str)] + list(row.get("wrong", ()))


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("seed", [0, 1, 7])
def test_no_training_row_contains_a_held_out_question(kind, seed):
    held_out = {question.prompt for question in world.held_out_questions(seed, 140)}
    assert len(held_out) == 140
    for row in ROWS[kind](seed):
        padded = [f"{text} " for text in texts(row)]  # so that a prompt matches whole words only
        assert not any(f"{prompt} " in text for prompt in held_out for text in padded), row


@pytest.mark.parametrize("kind", ROWS)
def test_the_same_seed_gives_the_same_rows_and_another_seed_others(kind):
    assert ROWS[kind](3) == ROWS[kind](3) != ROWS[kind](4)


def test_every_word_of_the_world_has_a_token():
    known = set(vocabulary())
    for seed in range(3):
        for rows in ROWS.values():
            for row in rows(seed):
                assert set(" ".join(texts(row)).split()) <= known


def test_the_judge_gives_good_answers_all_and_bad_answers_less():
    rng = np.random.default_rng(0)
    for question in islice(world.draw_questions(0), 300):
        assert judge(question, world.good_answer(question)).score == pytest.approx(1.0), question
        assert judge(question, world.bad_answer(question, rng)).score < 0.9, question


def test_a_preference_pair_is_ordered_by_the_judge():
    by_prompt = {question.prompt: question for question in islice(world.draw_questions(2), 5000)}
    for row in world.preference_rows(0, 500):
        question = by_prompt[row["prompt"]]
        assert judge(question, row["chosen"]).score > judge(question, row["rejected"]).score


def test_a_slip_is_polite_and_wrong_by_one_word():
    rng = np.random.default_rng(0)
    for question in islice(world.draw_questions(0), 300):
        slip, good = world.slip(question, rng), world.good_answer(question)
        assert judge(question, slip).score <= 0.7, (question, slip)
        assert slip.startswith(world.DECLINE if question.harmful else world.POLITE)
        if not question.members:
            assert sum(a != b for a, b in zip(slip.split(), good.split(), strict=True)) == 1


def test_half_of_the_bad_answers_are_slips():
    rows = world.preference_rows(0, 1000)
    polite = [row["rejected"].startswith((world.POLITE, world.DECLINE)) for row in rows]
    assert 0.45 < np.mean(polite) < 0.55
