"""Dynamic sampling: which prompts stay, which replace others, and what is drawn again after a resume."""

import numpy as np
import pytest

from jaxalign.rollout.engine.engine import Response
from jaxalign.rollout.scored import ScoredResponses, draw_with_spread, replacements, score_std


def drawing(worth, calls):
    """Two responses to prompt p, worth worth[p] and 1, whose only token says how many were drawn before them."""

    def draw(numbers, before):
        calls.append((numbers.tolist(), before))
        chosen = np.repeat(numbers, 2)
        scores = np.array([worth[p] if k % 2 == 0 else 1.0 for k, p in enumerate(chosen)], np.float32)
        responses = [Response(np.array([before + k]), np.zeros(1), np.zeros(1), True) for k in range(len(chosen))]
        return ScoredResponses(chosen, responses, [str(p) for p in chosen], scores, {"only": scores.astype(np.float64)})

    return draw


def test_prompts_of_equal_scores_give_way_to_the_next_until_there_are_enough():
    """Only 1 of 0 1 2 3 has a spread: three are missing, and four are drawn, the most; 4 and 7 have one, then 8."""
    worth, calls = [1, 0, 1, 1, 0, 1, 1, 0, 0, 0], []
    drawn, metrics = draw_with_spread(drawing(worth, calls), np.arange(4), np.arange(4, 10), n=2, rounds=5)
    assert calls == [([0, 1, 2, 3], 0), ([4, 5, 6, 7], 8), ([8, 9], 16)]
    assert drawn.prompts.tolist() == [1, 1, 4, 4, 7, 7, 8, 8] and drawn.texts[0] == "1"
    assert [int(r.tokens[0]) for r in drawn.responses] == [2, 3, 8, 9, 14, 15, 16, 17]  # no seed comes twice
    np.testing.assert_array_equal(drawn.terms["only"], [0, 1] * 4)
    assert metrics == {"sampling_rounds": 3, "kept_share": 0.5, "score_drawn": pytest.approx(0.75)}


def test_rounds_end_and_a_step_without_any_group_keeps_its_own():
    worth, calls = [1, 0, 1, 1, 0, 1], []
    drawn, metrics = draw_with_spread(drawing(worth, calls), np.arange(2), np.arange(2, 6), n=2, rounds=2)
    assert len(calls) == 2 and drawn.prompts.tolist() == [1, 1] and metrics["kept_share"] == pytest.approx(1 / 4)
    drawn, metrics = draw_with_spread(drawing([1, 1, 1], []), np.arange(2), np.arange(2, 3), n=2, rounds=9)
    assert drawn.prompts.tolist() == [0, 0, 1, 1] and metrics["kept_share"] == 0 and metrics["sampling_rounds"] == 2


def test_replacements_follow_from_seed_and_step_alone_and_are_not_the_chosen():
    chosen = np.array([3, 1])
    order = replacements(6, chosen, seed=0, step=5)
    assert sorted(order.tolist()) == [0, 2, 4, 5]
    np.testing.assert_array_equal(order, replacements(6, chosen, seed=0, step=5))
    assert any(not np.array_equal(order, replacements(6, chosen, seed=0, step=step)) for step in range(5))


def test_the_spread_of_scores_is_the_one_that_advantages_divide_by():
    scores = np.array([[0.0, 1.0], [3.0, 7.0]], np.float32)
    assert score_std(scores) == pytest.approx((np.sqrt(0.5) + np.sqrt(8)) / 2)
    assert score_std(scores[:, :1]) == 0
