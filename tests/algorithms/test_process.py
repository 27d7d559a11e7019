"""Process reward models: each step is read at its own end, wherever its solution stands in the batch."""

import jax
import numpy as np
import pytest
from flax import nnx

from jaxalign.algorithms.process import process_reward, step_scores
from jaxalign.data.batches.groups import Responses
from jaxalign.losses.ranking import kwise, process_mse
from jaxalign.models import heads
from tests.algorithms.shared import QUICKLY, batch_of, make_responses

S = 3


@pytest.fixture(scope="module")
def solutions():
    """Eight, of 1 to 3 steps each; a step in three is not labelled."""
    alone, rng = make_responses(8, k=1, seed=7), np.random.default_rng(8)
    ends = np.full((8, S), -1, np.int32)
    for i, length in enumerate(alone.lengths[:, 0]):
        count = rng.integers(1, S + 1)
        ends[i, :count] = np.sort(rng.choice(length, count, replace=False))
    labels = np.where((ends < 0) | (rng.random((8, S)) < 1 / 3), -1, rng.random((8, S)))
    columns = {"step_ends": ends, "step_labels": labels.astype(np.float32)}
    return Responses(alone.examples, alone.groups, columns)


@pytest.mark.parametrize("packing", [True, False])
def test_the_loss_is_the_mean_over_labelled_steps_of_what_stands_at_their_ends(tiny, solutions, packing):
    params = {"model": tiny[1], "head": heads.init_head(jax.random.key(5), 2, 32)}
    model, errors, right = nnx.merge(tiny[0], tiny[1]), [], []
    hidden = jax.jit(lambda ids: model(ids), compiler_options=QUICKLY)
    for i in range(8):
        ids, _ = solutions.examples[i]
        every = (
            np.asarray(hidden(np.pad(ids, (0, 20 - len(ids)))[None].astype(np.int32)))[0] @ np.asarray(params["head"]).T
        )
        for end, label in zip(solutions.columns["step_ends"][i], solutions.columns["step_labels"][i], strict=True):
            if label >= 0:
                errors.append(np.mean((1 / (1 + np.exp(-every[end])) - label) ** 2))
                right.append((every[end].mean() > 0) == (label > 0.5))
    batch = batch_of(solutions, packing=packing)
    loss = jax.jit(process_reward(tiny[0], loss=process_mse).loss, compiler_options=QUICKLY)
    value, metrics = loss(params, batch)
    assert value.count == len(errors) and float(value.compute()) == pytest.approx(np.mean(errors), abs=1e-5)
    assert float(metrics["accuracy"].compute()) == pytest.approx(np.mean(right))
    assert step_scores(tiny[0], params, batch).shape == (*batch.slots.shape[:2], S, 2)


def test_a_loss_of_whole_responses_is_refused(tiny):
    with pytest.raises(ValueError, match="has an unknown input 'scores'"):
        process_reward(tiny[0], loss=kwise)
