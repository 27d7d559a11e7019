"""examples/own_algorithm.py: labels by hand, and a policy that learns from them."""

import numpy as np
import pytest

from jaxalign.config.shared import MeshConfig, OptimizerConfig
from jaxalign.mistake import Mistake
from jaxalign.rollout.engine.engine import Response
from jaxalign.rollout.scored import ScoredResponses
from tests.shared import final, rows


@pytest.fixture
def config(tiny_model, prompts, tmp_path):
    from own_algorithm import OnlineKTOConfig

    return OnlineKTOConfig(
        model=str(tiny_model),
        data=str(prompts),
        output=tmp_path / "run",
        reward="own_reward:share_of(word='dog')",
        steps=6,
        batch_size=4,
        n=4,
        max_length=16,
        max_new_tokens=6,
        slots=8,
        remat="none",
        mesh=MeshConfig(data=1, fsdp=1),
        optimizer=OptimizerConfig(learning_rate=1e-2, schedule="constant"),
    )


def test_a_response_is_desirable_above_the_mean_of_its_prompt_and_its_mismatch_has_another_prompt(config):
    """Two prompts of two tokens, two responses of one or two tokens each; the labels are those of 0 1 and 3 1."""
    from own_algorithm import to_batch

    tokens, scores = [[10], [11, 2], [12, 2], [13]], np.array([0.0, 1.0, 3.0, 1.0], np.float32)
    responses = [Response(np.array(t), np.zeros(len(t)), np.zeros(len(t)), True) for t in tokens]
    scored = ScoredResponses(np.array([0, 0, 1, 1]), responses, ["a"] * 4, scores, {})
    prompts = [(1, 4), (1, 4), (1, 5), (1, 5)]
    config = type(config)(model="m", data="d", output=config.output, n=2)
    batch, metrics = to_batch(config, 6, scored, prompts, width=4, step=0)
    assert metrics == {"score": 1.25, "score_std": pytest.approx(1.5 / 2**0.5), "desirable": 0.5}

    def sequences(part):
        """(tokens, learned tokens, number) of each row with a response."""
        rows = zip(part.sequences.tokens[:, 0], part.sequences.mask[:, 0], part.valid[:, 0], strict=True)
        return [(t[t > 0].tolist(), t[m].tolist(), i) for i, (t, m, valid) in enumerate(rows) if valid]

    labels = {tuple(learned): bool(batch.rated.columns["label"][i, 0]) for _, learned, i in sequences(batch.rated)}
    assert labels == {(10,): False, (11, 2): True, (12, 2): True, (13,): False}
    assert batch.rated.sequences.tokens.shape == batch.mismatched.sequences.tokens.shape == (6, 1, 4)
    own = {4: {(10,), (11, 2)}, 5: {(12, 2), (13,)}}
    mixed = sequences(batch.mismatched)
    assert len(mixed) == 4 and all(tuple(learned) not in own[whole[1]] for whole, learned, _ in mixed)


def test_online_kto_raises_the_score_of_the_policys_responses(config, one_device):
    from own_algorithm import main

    assert main(config) == 0
    metrics = rows(config.output)
    names = "loss", "kl", "rewards/chosen", "rewards/rejected", "score", "desirable", "grad_norm"
    assert all(np.isfinite(row[name]) for row in metrics for name in names)
    # policy and reference agree at first, so KTO's loss is λ/2 and no reward is implied
    assert metrics[0]["loss"] == pytest.approx(0.5, abs=1e-4)
    assert metrics[0]["rewards/chosen"] == pytest.approx(0.0, abs=1e-4)
    assert metrics[-1]["rewards/chosen"] > metrics[-1]["rewards/rejected"]
    assert np.mean([row["score"] for row in metrics[-2:]]) > np.mean([row["score"] for row in metrics[:2]])
    assert all(np.isfinite(tensor).all() for tensor in final(config.output).values())


def test_one_response_to_a_prompt_is_refused(config):
    from own_algorithm import check

    with pytest.raises(Mistake, match="`n` 1, `batch_size` 8: a response is rated beside others to its prompt"):
        check(type(config)(model="m", data="d", output=config.output, n=1, max_new_tokens=8))
