"""examples/own_loss.py: a pure function, and the same function under `jaxalign dpo`."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.cli.main import main
from tests.shared import rows


def test_the_loss_is_delta_squared_where_policy_and_reference_agree_and_0_beyond_the_margin():
    from own_loss import squared_hinge

    logps = jnp.array([-3.0, -1.0])
    np.testing.assert_array_equal(squared_hinge(logps, logps - 1, logps, logps - 1, delta=0.5), [0.25, 0.25])
    # margins 0.25 and 2: (1 - 0.25)² and nothing
    gains = jnp.array([0.25, 2.0])
    np.testing.assert_array_equal(squared_hinge(logps + gains, logps, logps, logps), [0.5625, 0.0])


def test_a_run_with_the_loss_starts_at_delta_squared_and_falls(flags, pairs, tmp_path, one_device):
    from own_loss import train

    learning = ["--steps", "6", "--optimizer.learning-rate", "5e-3", "--eval-share", "0"]
    assert train([*flags, "--data", str(pairs), *learning]) == 0
    losses = [row["loss"] for row in rows(tmp_path / "run")]
    assert losses[0] == pytest.approx(1.0, abs=1e-4) and losses[-1] < 0.5


def test_a_keyword_that_the_loss_lacks_is_refused_before_the_model_is_read(capsys, tmp_path):
    (tmp_path / "model").mkdir()  # files are looked at first, and there is no config in it to read
    (tmp_path / "model" / "config.json").write_text("{")
    (tmp_path / "rows.jsonl").write_text("{")
    paths = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "rows.jsonl")]
    paths += ["--output", str(tmp_path / "run")]
    assert main(["dpo", *paths, "--algorithm.loss", "own_loss:squared_hinge(detla=1.0)"]) == 2
    assert "has no keyword 'detla' (did you mean 'delta'?)" in capsys.readouterr().err
