"""The quickstart's own runs, small: from a random model instead of a pretrained one, two steps a stage."""

import dataclasses
import json

import jax
import pytest

from jaxalign.config.inference import QuickstartConfig
from jaxalign.quickstart import judge, pipeline, stages, tokenizer, world
from jaxalign.report.curves import SMOOTHING
from jaxalign.rollout.rewards.functions import reward_model
from jaxalign.training.metrics import read_rows
from tests.shared import on_one_device

STEPS, SMALL = 2, {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def write_random_model(folder):
    """Writes a folder with the quickstart's tokenizer and chat template, and with random weights."""
    from transformers import AutoTokenizer

    from jaxalign.models.decoder.decoder import init_params
    from jaxalign.models.files.families import model_config
    from jaxalign.models.files.save import save_pretrained

    tokenizer.write_start(folder / "start")
    hf = json.loads((folder / "start" / "config.json").read_text()) | SMALL | {"num_key_value_heads": 2}
    config = model_config(hf)
    params = init_params(config, jax.random.key(0))
    words = AutoTokenizer.from_pretrained(folder / "start")
    save_pretrained(folder / "final", params, config, hf, tokenizer=words, generation_config={"eos_token_id": 2})


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """Folder of a quickstart that begins with SFT, without DPO and KTO, which have tests of their own."""

    def plan(output, seed):
        for planned in stages.plan(output, seed):
            if planned.name in ("SFT", "reward", "PPO", "GRPO"):
                smaller = {"steps": STEPS, "batch_size": 8} | ({} if planned.name == "reward" else {"samples": 8})
                optimizer = dataclasses.replace(planned.config.optimizer, warmup_steps=0)
                yield planned._replace(config=dataclasses.replace(planned.config, optimizer=optimizer, **smaller))

    folder = tmp_path_factory.mktemp("quickstart")
    write_random_model(folder / "base")
    with on_one_device(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "plan", plan)
        patch.setattr(pipeline, "PRETRAINING_TEXTS", 1)
        patch.setattr(pipeline, "INSTRUCTIONS", 70)
        patch.setattr(pipeline, "QUESTIONS", 14)
        assert pipeline.main(QuickstartConfig(folder)) == 0
    return folder


def samples(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_grpo_is_rewarded_by_the_judge(output):
    questions = {row["prompt"]: world.Question(**row) for row in world.question_rows(0, 70)}
    assert len(samples(output / "grpo")) == 8
    for sample in samples(output / "grpo"):
        question, response = questions[sample["prompt"]], sample["response"]
        scores = {judge.judge(question, response, finished=ended).score for ended in (True, False)}
        assert min(abs(sample["score"] - score) for score in scores) < 1e-6


def test_ppo_is_rewarded_by_the_quickstarts_reward_model_and_an_answer_without_end_costs_one(output):
    path, rows = str(output / "reward" / "final"), samples(output / "ppo")
    prompts, responses = [row["prompt"] for row in rows], [row["response"] for row in rows]
    ended, cut_off = (reward_model(prompts, responses, path=path, finished=[e] * 8) for e in (True, False))
    for row, score, without_end in zip(rows, ended, cut_off, strict=True):
        assert min(abs(row["score"] - score), abs(row["score"] - (without_end - 1))) < 1e-4


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_policies_start_as_the_sft_model(output, stage):
    row = read_rows(output / stage / "metrics.jsonl")[0]
    assert row["kl"] == pytest.approx(0, abs=1e-3)
    assert row.get("first/ratio", row["ratio"]) == pytest.approx(1, abs=1e-4)


def test_no_question_of_the_page_was_asked_in_training(output):
    held_out = {question.prompt for question in world.held_out_questions(0, 14)}
    rows = [json.loads(line) for line in (output / "world" / "questions.jsonl").read_text().splitlines()]
    assert not held_out & {row["prompt"] for row in rows}


def test_the_page_shows_a_curve_of_scores_and_one_of_kl_for_each_policy(output):
    page = (output / "index.html").read_text()
    assert page.count("<svg") == 4 and page.count("policy, reference, reward model, critic") == 1
    kl = sum(row["kl"] for row in read_rows(output / "ppo" / "metrics.jsonl")[-SMOOTHING:]) / STEPS
    assert "PPO: in 2 steps the reward model&#x27;s score" in page
    assert f"{kl:.2f} nats per answer from the SFT model" in page
