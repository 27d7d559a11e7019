"""The over-optimisation experiment: its gold reward, the best of n, the fits, and a smoke run on a real model."""

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "experiments"))
import overoptimisation_curves as curves
import rm_overoptimisation
from overoptimisation_proxies import QUICK, Pool, accuracy, compare
from overoptimisation_rewards import gold, stammers


def test_gold_counts_a_happy_word_once_and_takes_one_off_for_each_word_said_again_soon(tmp_path):
    path = tmp_path / "lexicon.txt"
    path.write_text("happy\t2.5\nsad\t-2.0\n")
    texts = ["Happy!", "happy, HAPPY", "a sad dog", "happy a b c d e f g happy", "happy a b c d e f g h happy", ""]
    assert gold([""] * 6, texts, path=str(path)) == [2.5, 1.5, -2.0, 1.5, 2.5, 0.0]  # eight before, and no further
    assert stammers(["the", "cat", "and", "the", "dog", "and", "the", "cat"]) == 4


def test_the_best_of_n_is_the_mean_over_all_subsets_of_n():
    draw = np.random.default_rng(0)
    values, scores = draw.normal(size=(2, 7)), draw.normal(size=(2, 7))
    for n in range(1, 8):
        every = [
            [value[list(s)][np.argmax(score[list(s)])] for s in itertools.combinations(range(7), n)]
            for value, score in zip(values, scores, strict=True)
        ]
        np.testing.assert_allclose(curves.best_of_n(values, scores, [n]), [np.mean(every)], rtol=1e-12)


def test_the_weights_of_the_best_of_n_are_a_distribution_even_where_binomials_overflow():
    weights = curves.best_of_n_weights(16_384, 1000)
    np.testing.assert_allclose(weights.sum(), 1.0, rtol=1e-9)
    np.testing.assert_allclose(weights[-1], 1000 / 16_384)
    assert (weights[:999] == 0).all() and (np.diff(weights) >= 0).all()


def test_the_best_of_n_uniform_samples_by_themselves_is_n_over_n_plus_one_and_of_one_the_mean():
    values = np.tile((np.arange(1, 1000) / 1000)[None], (3, 1))  # the mean largest of n of 1 .. N is n (N + 1)/(n + 1)
    np.testing.assert_allclose(curves.best_of_n(values, values, [1, 4, 99]), [0.5, 0.8, 0.99], rtol=1e-12)


def test_the_best_of_one_is_the_reference_and_the_kl_of_the_best_of_two_is_log_two_less_a_half():
    np.testing.assert_allclose(curves.best_of_n_kl(np.array([1, 2])), [0.0, np.log(2) - 0.5])
    grid = (np.arange(100_000) + 0.5) / 100_000  # the best of n of a uniform score has density n u^(n-1)
    density = 8 * grid**7
    np.testing.assert_allclose(curves.best_of_n_kl(8), np.mean(density * np.log(density)), atol=1e-6)


@pytest.mark.parametrize("form", curves.FORMS)
def test_a_fit_recovers_alpha_and_beta_of_an_exact_curve_and_its_peak_is_where_the_slope_is_zero(form):
    d = np.linspace(0.0, 6.0, 25)
    exact = d * (1.5 - 0.4 * d) if form == "best-of-n" else np.r_[0.0, d[1:] * (1.5 - 0.4 * np.log(d[1:]))]
    fitted = curves.fit(form, d, exact)
    np.testing.assert_allclose(fitted, (1.5, 0.4), rtol=1e-10)
    top = curves.peak(form, fitted)
    around = curves.predicted(form, fitted, np.array([top - 1e-3, top, top + 1e-3]))
    assert around[1] > around[0] and around[1] > around[2]
    assert curves.peak(form, curves.Fit(1.0, -0.1)) == np.inf


def test_identical_curves_have_a_spread_of_zero_and_noise_has_one():
    d, draw = np.tile(np.linspace(0.1, 3.0, 9), (5, 1)), np.random.default_rng(0)
    np.testing.assert_allclose(curves.spread("rl", d, 2 * d), (0.0, 0.0), atol=1e-12)
    assert min(curves.spread("rl", d, 2 * d + draw.normal(size=d.shape))) > 0.05


def test_the_error_of_a_mean_of_two_independent_steps_is_root_two_of_one_step_s_over_two():
    nothing = curves.Fit(0.0, 0.0)
    curve = curves.Curve("rl", "p", [0.0, 1.0, 2.0, 3.0], [0.0] * 4, [9.0, 1.0, 2.0, 9.0], [0.2] * 4, nothing, nothing)
    np.testing.assert_allclose(curves.within(curve, 1.0, 3.0), (1.5, 0.2 / np.sqrt(2)))
    assert np.isnan(curves.within(curve, 5.0, 7.0)).all()


def test_a_quarter_of_the_labels_is_wrong_and_a_tie_is_no_pair():
    rows = [{"prompt": "p", "response": f"{i % 2}", "gold": float(i % 2)} for i in range(8000)]
    pairs = compare(rows)
    assert len(pairs) == 4000 and compare([{**rows[0]}, {**rows[0]}]) == []
    wrong = np.mean([pair["chosen"] == "0" for pair in pairs])
    assert abs(wrong - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 4000)


def test_accuracy_is_one_of_the_gold_itself_and_zero_of_its_opposite():
    known = np.array([[0.0, 1.0, 2.0, 3.0, 4.0, 2.0]])
    pool = Pool(known, {"same": known, "opposite": -known})
    assert (accuracy(pool, "same"), accuracy(pool, "opposite")) == (1.0, 0.0)
    np.testing.assert_allclose([pool.normal(known).mean(), pool.normal(3 + 5 * known).std()], [0.0, 5.0], atol=1e-12)


def test_the_quick_run_optimises_the_reference_on_every_proxy_and_draws_the_curves(shared_data, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "argv", ["rm", str(shared_data), "--output", str(tmp_path), "--quick"])
    assert rm_overoptimisation.main() == 0
    traced = [curves.Curve(**row) for row in json.loads((tmp_path / "curves.json").read_text())]
    assert [c.form for c in traced] == ["best-of-n"] * 3 + ["rl"] * 2
    for c in traced:
        assert c.d[0] < 1e-2  # the reference itself: the best of one, and the policy that has not learned yet
        assert len(c.d) == (len(QUICK.ns) if c.form == "best-of-n" else QUICK.steps)
    for c in traced[:3]:
        np.testing.assert_allclose([c.gold_scores[0], c.proxy_scores[0]], 0.0, atol=1e-9)
        assert np.all(np.diff(c.proxy_scores) > 0)  # choosing among more never lowers what is chosen by
    for name in (
        "width-8",
        "min-of-2",
    ):  # by the estimate that is never negative: `d` is 0 where noise makes the other so
        steps = [json.loads(row) for row in (tmp_path / f"rl-{name}" / "metrics.jsonl").read_text().splitlines()]
        assert steps[0]["kl_k3"] < 1e-6 and steps[-1]["kl_k3"] > 1e-2  # it has moved
    assert (tmp_path / "rm_overoptimisation.png").read_bytes().startswith(b"\x89PNG")
