"""examples/own_reward.py: scores by hand, and a policy that learns to earn them."""

import numpy as np

from tests.shared import rows


def test_scores_of_one_response_and_of_all():
    from own_reward import share_of, unlike_others

    assert share_of("one ?", "dog cat dog dog", word="dog") == 0.75 and share_of("one ?", "", word="dog") == 0.0
    # the last stands alone; of the other three two are the same
    prompts, responses = ["one ?", "one ?", "one ?", "two ?"], ["dog", "dog", "cat", "dog"]
    assert unlike_others(prompts, responses) == [0.5, 0.5, 1.0, 1.0]


def test_the_share_of_the_rewarded_word_rises(flags, prompts, tmp_path, one_device):
    from own_reward import train

    learning = ["--steps", "8", "--batch-size", "4", "--n", "8", "--optimizer.learning-rate", "1e-2"]
    sampling = ["--max-new-tokens", "8", "--slots", "8"]
    assert train([*flags, "--data", str(prompts), *learning, *sampling]) == 0
    metrics = rows(tmp_path / "run")
    shares = [row["scores/share_of"] for row in metrics]
    assert np.mean(shares[-2:]) > np.mean(shares[:2]) + 0.1
    for row in metrics:
        assert abs(row["score"] - row["scores/share_of"] - 0.1 * row["scores/unlike_others"]) < 1e-5
