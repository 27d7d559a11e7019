"""`jaxalign grpo`, `rloo` and `online-dpo` on a tiny model: rewards rise, runs resume exactly, nothing is lost."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxalign.cli.main import main
from jaxalign.commands import grpo, online_dpo
from jaxalign.config.limits import settings
from jaxalign.config.on_policy import (
    GRPOAlgorithm,
    GRPOConfig,
    OnlineDPOAlgorithm,
    OnlineDPOConfig,
    PPOConfig,
    RLOOConfig,
)
from jaxalign.config.shared import LoraConfig, OptimizerConfig
from jaxalign.rollout.engine.engine import Response
from jaxalign.rollout.rewards.rewards import RewardError
from jaxalign.rollout.scored import ScoredResponses
from jaxalign.run.folder import open_run
from tests.commands.settings import ON_POLICY
from tests.rollout.answers import answers
from tests.shared import final, on_one_device, rows

COMMANDS = {  # by a name of the run
    "grpo": (grpo.main, GRPOConfig, {}),
    "rloo": (grpo.main, RLOOConfig, {}),
    "dapo": (
        grpo.main,
        GRPOConfig,
        {
            "reward": "tests.commands.rewards:names_dog + 0.1*overlong(max_length=8, buffer=2)",
            "dynamic_sampling": 3,
            "top_p": 0.9,
            "n": 4,
            # slow enough that some prompts still tell responses apart at the last step
            "optimizer": OptimizerConfig(learning_rate=5e-3, schedule="constant"),
            "algorithm": GRPOAlgorithm("ppo_clip(clip_epsilon_high=0.28)"),
        },
    ),
    "online-dpo": (
        online_dpo.main,
        OnlineDPOConfig,
        {"n": 4, "batch_size": 8, "microbatches": 2, "algorithm": OnlineDPOAlgorithm("dpo(beta=0.2)")},
    ),
}


@pytest.fixture(scope="module")
def trained(tiny_model, prompts, tmp_path_factory):
    """A function of a run's name: its config and command, after it has been made once."""

    @functools.cache
    def train(name):
        run, kind, options = COMMANDS[name]
        output = tmp_path_factory.mktemp(name) / "run"
        config = kind(model=str(tiny_model), data=str(prompts), output=output, **{**ON_POLICY, **options})
        with on_one_device():
            assert run(config) == 0
        return config, run

    return train


@pytest.mark.parametrize("name", COMMANDS)
def test_rewards_rise_and_the_screen_tells_the_truth(trained, name):
    config, _ = trained(name)
    steps = rows(config.output)
    scores = [row["score"] for row in steps]
    assert np.mean(scores[-3:]) > np.mean(scores[:3]) + 0.2
    assert 0 < steps[0]["length"] <= 8
    samples = [json.loads(line) for line in (config.output / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in samples] == [0, 0, 4, 4, 8, 8]
    assert samples[0].keys() == {"step", "prompt", "response", "score"}
    if name == "online-dpo":
        assert steps[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-5) and steps[-1]["rewards/margins"] > 0
        assert all(row["score_chosen"] > row["score"] > row["score_rejected"] for row in steps)
        assert steps[0]["scores/dogs"] == pytest.approx(steps[0]["score"], abs=1e-6)
        return
    assert steps[0]["ratio"] == pytest.approx(1.0, abs=1e-4)  # sampling and scoring agree
    assert steps[0]["kl"] == pytest.approx(0.0, abs=1e-3) and steps[-1]["kl_k3"] > 0.01
    assert 0 < steps[0]["entropy"] < np.log(32)


@pytest.mark.parametrize(("advantages", "first"), [("batch", 0.9352), ("scores", 0.0418), ("global", -1.2119)])
def test_advantages_of_prompts_of_different_difficulty_are_those_that_are_named(advantages, first):
    """Groups (0, 1), (10, 11), (20, 21), (30, 31): REINFORCE++ with baseline, TRL's "batch", and REINFORCE++."""
    scores = np.array([0, 1, 10, 11, 20, 21, 30, 31], np.float32)
    responses = [Response(np.array([5, 2]), np.zeros(2), np.zeros(2), True)] * 8
    scored = ScoredResponses(np.arange(8) // 2, responses, [""] * 8, scores, {})
    config = GRPOConfig(model="m", data="d", output=Path("o"), n=2, algorithm=GRPOAlgorithm(advantages=advantages))
    batch, metrics = grpo.to_batch(config, {}, 8, scored, [(1, 4)] * 8, width=4, step=0)
    assert batch.columns["advantages"][1, 2] == pytest.approx(first, abs=1e-4)
    assert metrics["score_std"] == pytest.approx(0.5**0.5)


def test_dynamic_sampling_learns_from_unequal_scores_alone_and_a_nucleus_weighs_its_mass(trained):
    config, _ = trained("dapo")
    steps = rows(config.output)
    assert all(row["same_scores"] == 0 for row in steps)
    assert {row["sampling_rounds"] for row in steps} <= {1, 2, 3} and steps[0]["sampling_rounds"] > 1
    assert 0 < min(row["kept_share"] for row in steps) < 1
    # every token of a nucleus of mass 0.9 or a little more weighs that mass
    assert all(0.89 < row["importance_weight"] < 1 for row in steps)
    for row in steps:
        assert row["score"] == pytest.approx(row["scores/names_dog"] + 0.1 * row["scores/overlong"], abs=1e-6)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_run_that_goes_on_from_a_checkpoint_ends_bit_for_bit_the_same(trained, name, tmp_path, one_device):
    config, run = trained(name)
    again = dataclasses.replace(config, output=tmp_path / "again")
    shutil.copytree(config.output, again.output)
    shutil.rmtree(again.output / "checkpoints" / "12")
    shutil.rmtree(again.output / "final")
    assert run(again) == 0
    assert rows(again.output) == rows(config.output)
    assert (again.output / "samples.jsonl").read_text() == (config.output / "samples.jsonl").read_text()
    for key, tensor in final(config.output).items():
        assert final(again.output)[key].tobytes() == tensor.tobytes()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fails_later", "raised RuntimeError: the judge has gone home"),
        ("exits_later", r"ended its process \(exit status 0\), at response 2 \(to prompt \d+, '[\w ?]+'\)$"),
    ],
)
def test_a_reward_that_fails_in_the_middle_leaves_a_checkpoint_to_go_on_from(
    name, message, trained, tmp_path, one_device
):
    config, run = trained("grpo")
    broken = dataclasses.replace(config, output=tmp_path / "run", reward=f"tests.commands.rewards:{name}")
    with pytest.raises(RewardError, match=f"the reward {name} {message}"):
        run(broken)
    assert (broken.output / "checkpoints" / "2").is_dir()
    assert [row["step"] for row in rows(broken.output)] == [1, 2]


def test_a_run_whose_reward_took_too_long_goes_on_with_more_time_for_it(tmp_path):
    config = GRPOConfig(model="m", data="d", output=tmp_path / "run", reward_seconds=1.0)
    assert not open_run(config, command="grpo", resume=True, write=True)
    assert open_run(dataclasses.replace(config, reward_seconds=10.0), command="grpo", resume=True, write=True)
    with pytest.raises(ValueError, match="holds another run: reward was 'numeric_match', now 'exact_match'"):
        open_run(dataclasses.replace(config, reward="exact_match"), command="grpo", resume=True, write=True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--reward", "tests.commands.rewards:dog"], "has no function 'dog' (did you mean 'dogs'?)"),
        (["--reward", "numeric_mach"], "did you mean 'numeric_match'?"),
        (["--reward", "numeric_match"], "the reward numeric_match: prompt 1, "),
        (
            ["--reward", "tests.commands.rewards:needs"],
            "the data have no column 'solution'; they have answer, finished, tokens. needs takes it as an argument too",
        ),
        (["--n", "1"], "--n 1: a response is judged beside others"),
        (["--n", "1", "--algorithm.advantages", "global", "--dynamic-sampling", "1"], "no --dynamic-sampling"),
        (["--max-new-tokens", "16"], "--max-new-tokens 16 leaves no room for a prompt in --max-length 16"),
        (["--temperature", "0"], "--temperature 0: greedy responses are all alike"),
        (["--algorithm.minibatches", "3"], "cannot be cut into --algorithm.minibatches 3"),
        (["--max-new-tokens", "14"], "12 of 12 prompts have more than 2 tokens"),
        (["--algorithm.kl-coef", "0.1", "--algorithm.no-reference"], "needs the reference"),
        (["--algorithm.advantages", "decoupled", "--reward-clip", "1"], "one by one, not their sum"),
        (["--algorithm.importance-cap", "0"], "--algorithm.importance-cap 0.0: it must be above 0"),
        (["--offload-reference", "--algorithm.no-reference"], "there is none to keep"),
        (["--checkpoint.keep-best", "1"], "--checkpoint.keep-best is no flag of this command"),
        (["--eval-share", "0.1"], "--eval-share is no flag of this command"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(flags, message, tiny_model, prompts, tmp_path, capsys):
    common = ["--model", str(tiny_model), "--data", str(prompts), "--output", str(tmp_path / "run")]
    common += ["--reward", "tests.commands.rewards:dogs", "--max-length", "16", "--max-new-tokens", "8"]
    common += ["--batch-size", "4", "--mesh.fsdp", "8"]
    assert main(["grpo", *common, *flags]) == 2
    log = capsys.readouterr().err
    assert message in log and "Traceback" not in log
    assert not (tmp_path / "run").exists()


def test_microbatches_change_no_step_of_online_dpo(trained, tmp_path, one_device):
    config, run = trained("online-dpo")
    assert run(dataclasses.replace(config, output=tmp_path / "run", steps=3, microbatches=1)) == 0
    for whole, cut in zip(rows(tmp_path / "run"), rows(config.output), strict=False):
        assert whole["score"] == pytest.approx(cut["score"], abs=1e-6)
        assert whole["grad_norm"] == pytest.approx(cut["grad_norm"], rel=1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--n", "1"], "--n 1: a pair is two responses"),
        (["--algorithm.loss", "aot"], "compares the pairs of whole batches"),
        (["--algorithm.loss", "ppo_clip"], "unknown name 'ppo_clip'"),
    ],
)
def test_mistakes_of_online_dpo_are_one_line(flags, message, tiny_model, prompts, tmp_path, capsys):
    common = ["--model", str(tiny_model), "--data", str(prompts), "--output", str(tmp_path / "run")]
    assert main(["online-dpo", *common, *flags]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_loss_of_the_policys_own_tokens_has_no_setting_that_cuts_any_off():
    cuts = {"top_p", "top_k", "min_p"}
    assert cuts <= settings(GRPOConfig).keys() and not cuts & settings(PPOConfig).keys()


def test_adapters_leave_the_reference_as_it_was(trained, tmp_path, one_device):
    """With LoRA the reference is the base: at the first step the policy is it, and then it is not."""
    config, run = trained("grpo")
    assert run(dataclasses.replace(config, output=tmp_path / "run", lora=LoraConfig(rank=2), steps=3)) == 0
    steps = rows(tmp_path / "run")
    assert steps[0]["kl"] == pytest.approx(0.0, abs=1e-3) and steps[2]["kl_k3"] > 1e-5
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").exists()


def test_the_final_folder_generates(trained):
    config, _ = trained("grpo")
    assert load_file(config.output / "final" / "model.safetensors")
    texts = [text for text, _ in answers(config.output / "final", ["one cat ?"], max_new_tokens=8, n=16)]
    words = " ".join(texts).split()
    assert words.count("dog") / len(words) > 0.2
