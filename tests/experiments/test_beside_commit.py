"""The comparison with a commit: how its figures become a table. The runs themselves are not tested here."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "experiments" / "benchmarks"))
import beside_commit

ROUNDS = [
    ({"step": 1.0, "GiB": 2.0}, {"step": 2.0, "GiB": 2.0}),
    ({"step": 4.0, "GiB": 1.0}, {"step": 3.0, "GiB": 1.0}),
]
ROUNDS += [({"step": 2.0, "GiB": 3.0}, {"step": 2.5, "GiB": 1.5})]


def test_a_ratio_is_of_one_round_so_that_what_slows_a_round_slows_both_sides():
    assert beside_commit.ratios(ROUNDS, "step") == [2.0, 0.75, 1.25]


def test_the_table_has_the_medians_of_both_sides_and_of_the_ratios():
    header, *lines = beside_commit.table("8765338819490dc4", ROUNDS).splitlines()
    assert header.split()[0] == "876533881949"
    assert [line.split() for line in lines] == [
        ["step", "2.000", "2.500", "1.25", "2.00", "0.75", "1.25"],
        ["GiB", "2.000", "1.500", "1.00", "1.00", "1.00", "0.50"],
    ]


def test_warm_steps_do_not_count():
    rows = [{"step": i, "step_seconds": 100.0 if i <= beside_commit.WARM else float(i)} for i in range(1, 7)]
    assert beside_commit.after_warm(rows, "step_seconds") == 5.0


def test_a_process_is_measured_and_one_that_fails_shows_its_log(tmp_path):
    figures = beside_commit.run(tmp_path, ["-c", "pass"])
    # no upper bound of memory: a forked child begins with the peak of its parent, here of a test worker
    assert 0 < figures["wall"] < 60 and figures["peak_gib"] > 0
    with pytest.raises(SystemExit, match="no such luck"):
        beside_commit.run(tmp_path, ["-c", "raise SystemExit('no such luck')"])
