"""Every loss and its gradient beside float64 numpy that was written from the papers (make_golden.py)."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.losses import OUTCOME, PAIR, STEPS, UNPAIRED, select_loss
from jaxalign.losses.contract import apply

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())
KINDS = PAIR, UNPAIRED, OUTCOME, STEPS
INPUTS = {name: jnp.asarray(np.asarray(value)) for name, value in GOLDEN["inputs"].items()}
INPUTS = {name: x.astype(jnp.float32) if x.dtype.kind == "f" else x for name, x in INPUTS.items()}


@pytest.mark.parametrize("text", GOLDEN["losses"])
def test_values_and_gradients_are_those_of_the_papers(text):
    loss, golden = select_loss(text, *KINDS), GOLDEN["losses"][text]
    np.testing.assert_allclose(apply(loss, INPUTS), golden["values"], rtol=3e-5, atol=3e-6)
    floats = {name: x for name, x in INPUTS.items() if name.startswith(("policy_", "chosen_s", "rejected_s"))}
    floats |= {name: INPUTS[name] for name in ("scores", "step_scores")}
    slopes = jax.grad(lambda moved: jnp.sum(apply(loss, INPUTS | moved)))(floats)
    for name, slope in slopes.items():
        expected = golden["gradients"].get(name, np.zeros(slope.shape))
        np.testing.assert_allclose(slope, expected, rtol=2e-4, atol=2e-5, err_msg=name)


def test_every_loss_has_a_golden_entry():
    named = {text.split("(")[0] for text in GOLDEN["losses"]}
    assert {name for kind in KINDS for name in kind.losses} <= named
