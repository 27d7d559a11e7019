"""`jaxalign ppo`, end to end on a tiny model: scores rise, a resumed run is exact, and ends are as told."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from jaxalign.cli.main import main
from jaxalign.commands import ppo, reward
from jaxalign.config.inference import ExportConfig
from jaxalign.config.offline import RewardConfig
from jaxalign.config.on_policy import CriticConfig, PPOAlgorithm, PPOConfig
from jaxalign.config.shared import LoraConfig, MeshConfig, OptimizerConfig, RefUpdateConfig
from jaxalign.data.batches.plan import Mixture, Plan
from jaxalign.data.batches.rows import TrainBatches
from jaxalign.data.read.tokens import Examples
from jaxalign.rollout.engine.engine import Response
from jaxalign.rollout.scored import ScoredResponses
from tests.commands.settings import ON_POLICY
from tests.shared import final, on_one_device, rows

EVERYTHING = PPOAlgorithm(
    kl_coef=0.05,
    kl_target=4.0,
    value_coef=0.5,
    value_clip_epsilon=None,
    normalise_scores=True,
    clip_scores=3.0,
    pretraining_coef=0.02,
    epochs=2,
    minibatches=2,
    halt_kl=1.0,
)


def config_of(tiny_model, prompts, output, **changes):
    settings = ON_POLICY | {"n": 8, "algorithm": EVERYTHING, "pretraining_data": str(prompts.with_name("text.jsonl"))}
    return PPOConfig(model=str(tiny_model), data=str(prompts), output=output, **settings | changes)


@pytest.fixture(scope="module")
def trained(tiny_model, prompts, tmp_path_factory):
    """One run with nearly all that PPO has, its critic a model of its own."""
    prompts.with_name("text.jsonl").write_text('{"text": "the cat sees the dog . the dog runs to the cat ."}\n' * 8)
    with on_one_device():
        config = config_of(tiny_model, prompts, tmp_path_factory.mktemp("ppo") / "run")
        assert ppo.main(config) == 0
    return config


def test_scores_rise_and_the_screen_tells_the_truth(trained):
    steps = rows(trained.output)
    scores = [row["score"] for row in steps]
    assert np.mean(scores[-3:]) > np.mean(scores[:3]) + 0.2
    for row in steps:  # sampling and scoring agree, at every step
        assert row["first/ratio"] == pytest.approx(1.0, abs=1e-4)
    assert steps[0]["kl"] == pytest.approx(0.0, abs=1e-3) and steps[-1]["kl_k3"] > 0.01
    assert steps[0]["explained_variance"] == pytest.approx(0.0, abs=1e-5)  # the first values are 0
    assert steps[-1]["value_loss"] < steps[0]["value_loss"]
    assert steps[-1]["kl_coef"] != steps[0]["kl_coef"] == pytest.approx(0.05)
    assert {"updates", "policy_loss", "rlhf_reward", "clip_fraction", "pretraining_loss"} <= steps[0].keys()
    lines = [json.loads(line) for line in (trained.output / "metrics.jsonl").read_text().splitlines()]
    assert {"training_seconds", "generation_seconds", "reward_seconds", "trained_tokens_per_second"} <= lines[0].keys()


def test_a_run_that_goes_on_from_a_checkpoint_ends_bit_for_bit_the_same(trained, tmp_path, one_device):
    """Policy, critic, both optimizers, the KL coefficient and the normaliser: all of it shows in the metrics."""
    again = dataclasses.replace(trained, output=tmp_path / "again")
    shutil.copytree(trained.output, again.output)
    shutil.rmtree(again.output / "checkpoints" / "12")
    shutil.rmtree(again.output / "final")
    assert ppo.main(again) == 0
    assert rows(again.output) == rows(trained.output)
    for key, tensor in final(trained.output).items():
        assert final(again.output)[key].tobytes() == tensor.tobytes()


def test_a_checkpoint_is_exported_as_the_policy_alone(trained, tmp_path):
    from jaxalign.commands import export

    assert export.main(ExportConfig(run=trained.output, output=tmp_path / "out")) == 0
    from safetensors.numpy import load_file

    exported = load_file(tmp_path / "out" / "model.safetensors")
    for key, tensor in final(trained.output).items():
        assert exported[key].tobytes() == tensor.tobytes()


def test_the_critic_starts_from_the_reward_model(tiny_model, prompts, tmp_path, one_device):
    """At a discount of 1 the first value of the last token is the score of the response without it."""
    pairs = tmp_path / "pairs.jsonl"
    lines = [{"prompt": "one cat ?", "chosen": " dog dog", "rejected": " cat the"} for _ in range(16)]
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {"steps": 4, "batch_size": 4, "max_length": 16, "remat": "none", "mesh": MeshConfig(data=1, fsdp=1)}
    scored = RewardConfig(model=str(tiny_model), data=str(pairs), output=tmp_path / "rm", **settings)
    scored = dataclasses.replace(scored, optimizer=OptimizerConfig(learning_rate=1e-2))
    assert reward.main(scored) == 0
    name = f"reward_model(path={str(tmp_path / 'rm' / 'final')!r})"
    config = config_of(tiny_model, prompts, tmp_path / "run", reward=name, steps=2, algorithm=PPOAlgorithm(epochs=1))
    assert ppo.main(dataclasses.replace(config, pretraining_data=None)) == 0
    first_row = rows(tmp_path / "run")[0]
    assert first_row["explained_variance"] > 0.05


@pytest.mark.parametrize(
    ("changes", "kl"),
    [
        ({"critic": CriticConfig(shared=True)}, 0.0),
        ({"lora": LoraConfig(rank=2), "critic": CriticConfig(learning_rate=1e-3)}, 0.0),
        ({"ref_update": RefUpdateConfig(every=1, alpha=1.0)}, None),
    ],
    ids=["shared", "lora", "moving reference"],
)
def test_other_critics_and_references(changes, kl, trained, tmp_path, one_device):
    plain = PPOAlgorithm(kl_coef=0.05, epochs=2)
    config = dataclasses.replace(trained, output=tmp_path / "run", steps=3, pretraining_data=None, algorithm=plain)
    assert ppo.main(dataclasses.replace(config, **changes)) == 0
    steps = rows(tmp_path / "run")
    assert [row["first/ratio"] for row in steps] == pytest.approx([1.0] * 3, abs=1e-4)
    if kl is None:  # the reference is the policy that draws
        assert [row["kl_k3"] for row in steps] == pytest.approx([0.0] * 3, abs=1e-4)
    else:
        assert steps[0]["kl"] == pytest.approx(kl, abs=1e-3) and steps[2]["kl_k3"] > 1e-5
    assert steps[2]["value_loss"] != steps[0]["value_loss"]


def test_a_reference_in_host_memory_changes_no_bit(trained, tmp_path, one_device):
    config = dataclasses.replace(
        trained, steps=2, pretraining_data=None, algorithm=PPOAlgorithm(kl_coef=0.05, epochs=2)
    )
    here, away = (dataclasses.replace(config, output=tmp_path / name) for name in ("here", "away"))
    assert ppo.main(here) == ppo.main(dataclasses.replace(away, offload_reference=True)) == 0
    assert rows(here.output) == rows(away.output) and rows(here.output)[1]["kl"] > 1e-3
    for key, tensor in final(here.output).items():
        assert final(away.output)[key].tobytes() == tensor.tobytes()


def test_a_budget_of_kl_ends_the_run_and_the_same_command_finds_it_complete(trained, tmp_path, one_device, caplog):
    config = dataclasses.replace(trained, output=tmp_path / "run", kl_budget=0.5, pretraining_data=None)
    config = dataclasses.replace(config, algorithm=PPOAlgorithm(kl_coef=0.0, epochs=2))
    assert ppo.main(config) == 0
    steps = rows(config.output)
    assert len(steps) < 12 and steps[-1]["kl"] > 0.5 and all(row["kl"] <= 0.5 for row in steps[:-1])
    before = (config.output / "final" / "model.safetensors").stat().st_mtime_ns
    assert ppo.main(config) == 0
    assert rows(config.output) == steps
    assert (config.output / "final" / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--critic.model", "nowhere", "--critic.shared"], "is a model of its own; leave out --critic.shared"),
        (["--critic.model", "nowhere"], "nowhere"),
        (["--pretraining-data", "PROMPTS"], "PPO-ptx needs both --pretraining-data and"),
        (["--algorithm.kl-in", "loss"], "needs --algorithm.kl-estimator k2 or k3"),
        (["--algorithm.kl-target", "0"], "it must be above 0"),
        (["--algorithm.gamma", "1.5"], "it must be at least 0 and at most 1"),
        (["--kl-budget", "-1"], "it must be above 0"),
        (["--check-kernels"], "--check-kernels is no flag of this command"),
        (["--ref-update.every", "1", "--lora.rank", "2"], "cannot follow the policy"),
        (
            ["--ref-update.every", "1", "--offload-reference"],
            "needs a frozen reference",
        ),
        (["--lora.rank", "2", "--offload-reference"], "the base that the adapters are on"),
        (["--ref-update.every", "1", "--ref-update.alpha", "2"], "--ref-update.alpha 2.0: it must be at most 1"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(flags, message, tiny_model, prompts, tmp_path, capsys):
    common = ["--model", str(tiny_model), "--data", str(prompts), "--output", str(tmp_path / "run")]
    common += ["--reward", "tests.commands.rewards:dogs", "--max-length", "16", "--max-new-tokens", "8"]
    common += ["--batch-size", "8", "--mesh.fsdp", "8"]
    assert main(["ppo", *common, *(str(prompts) if part == "PROMPTS" else part for part in flags)]) == 2
    log = capsys.readouterr().err
    assert message in log and "Traceback" not in log
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("score_at", "limit", "width"), [("last", 8, 8), ("after", 8, 12), ("after", 4, 8)])
def test_a_score_after_a_response_has_a_position_where_the_response_could_have_been_longer(score_at, limit, width):
    """Prompt and response fill their bucket of 8; rows that fill up hold no text of their own."""
    algorithm = PPOAlgorithm(score_at=score_at)
    config = PPOConfig(model="m", data="d", output=Path("o"), max_length=16, max_new_tokens=limit, algorithm=algorithm)
    responses = [Response(np.arange(4, 8), np.zeros(4), np.zeros(4), True)] * 2
    scored = ScoredResponses(np.arange(2), responses, [""] * 2, np.ones(2, np.float32), {})
    text = Examples.of([(np.arange(3, 9), np.ones(6, bool))] * 4)
    batches = TrainBatches(Mixture.of(text, [4], [None]), Plan(2, 16), steps=4)
    batch, _ = ppo.to_batch(config, batches, 3, scored, [(1, 4, 5, 6)] * 2, width=8, step=0)
    assert batch.sequences.tokens.shape == (3, width) and batch.columns["scores"].tolist() == [1, 1, 0]
    assert batch.pretraining.tokens.shape == (3, 16) and batch.pretraining.mask.any(axis=1).tolist()[2] is False
