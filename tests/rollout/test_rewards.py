"""Rewards: what each function says, sums, the data's columns, and every way to be wrong."""

import numpy as np
import pytest

from jaxalign.rollout.rewards import REWARDS, RewardError, Rewards


@pytest.mark.parametrize(
    ("response", "answer", "score"),
    [
        ("so it is 18", "a + b = 18\n#### 18", 1),
        ("#### 1,234\nor 7", "#### 1234", 1),
        ("12 then 18.0", "18", 1),
        ("costs $18", "#### 18", 1),
        ("-18", "18", 0),
        ("none", "18", 0),
    ],
)
def test_numbers_match_as_gsm8k_writes_them(response, answer, score):
    assert REWARDS["numeric_match"](["?"], [response], answer=[answer]) == [score]


def test_what_the_other_rewards_say(tmp_path):
    said = ["yes ", "no", '{"a": 1}']
    assert REWARDS["exact_match"]("???", said, answer=["yes", "yes", "x"]) == [1, 0, 0]
    assert REWARDS["regex"]("???", said, pattern=r"^y|n.$") == [1, 1, 0]
    assert REWARDS["json_schema"]("???", said, required=["a"]) == [0, 0, 1]
    assert REWARDS["length"]("??", ["a b c", "a"], target=2) == [-0.5, -0.5]
    (tmp_path / "words.txt").write_text("good\t1.5\tmore\nbad\t-2.0\n")
    path = str(tmp_path / "words.txt")
    assert REWARDS["lexicon"]("??", ["Good, good dog", "not bad"], path=path) == [3.0, -2.0]


def test_a_sum_is_weighted_and_columns_go_to_those_who_name_them():
    rewards = Rewards("0.5*tests.runs.rewards:answered(worth=4.0) + tests.runs.rewards:dogs")
    found = rewards(["?", "?"], ["a dog", "a cat"], {"answer": ["dog", "dog"], "other": [1, 2]})
    np.testing.assert_allclose(found, [2.5, 0.0])
    assert found.dtype == np.float32


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", "the reward raises raised ZeroDivisionError: division by zero"),
        ("short", "the reward short gave 1 scores for 2 responses"),
        ("undefined", "the reward undefined gave nan for response 1; a score is a finite number"),
        ("hangs", r"the reward hangs took longer than 0.2 s for 2 responses"),
        ("answered", "the data have no column 'answer'; they have none"),
    ],
)
def test_a_reward_that_is_wrong_is_named(name, message):
    with pytest.raises(RewardError, match=message):
        Rewards(f"tests.runs.rewards:{name}", seconds=0.2)(["?", "?"], ["a", "b"], {})
