"""The stages of the quickstart, in order: their data, their models in memory, and their settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from jaxalign.config.offline import DPOAlgorithm, DPOConfig, KTOAlgorithm, KTOConfig, RewardConfig, SFTConfig
from jaxalign.config.on_policy import CriticConfig, GRPOAlgorithm, GRPOConfig, PPOAlgorithm, PPOConfig
from jaxalign.config.shared import OptimizerConfig, TrainConfig

PRETRAINING_STEPS, SFT_STEPS, DPO_STEPS, KTO_STEPS, REWARD_STEPS = 600, 150, 100, 60, 100
PPO_STEPS, GRPO_STEPS = 30, 30
LENGTH, BATCH = 64, 32
SAMPLES = 2  # responses of a run that samples.jsonl shows, per evaluation
ANSWER = 20  # most tokens of a policy's answer in training; the longest good answer has 18


class Planned(NamedTuple):
    """A stage to be run, by the command whose settings `config` is."""

    name: str
    summary: str  # how the model is trained, in a line
    models: str  # in memory during training
    config: TrainConfig
    rewarded_by: str = ""  # source of the scores, if the model learns from its own answers


def plan(output: Path, seed: int) -> list[Planned]:
    """All stages in order. Each starts from files that earlier stages left in the output folder."""
    two, four = "policy, reference", "policy, reference, reward model, critic"
    pretrained = "pretrained from random weights on the world's texts, good and bad answers alike"
    own = "on the model's own answers, scored by"
    return [
        Planned("base", pretrained, "policy", _base(output, seed)),
        Planned("SFT", "supervised fine-tuning on demonstrations, some of them bad", "policy", _tuned(output, seed)),
        Planned("DPO", "SFT, then DPO on pairs of a good and a bad answer", two, _dpo(output, seed)),
        Planned("KTO", "SFT, then KTO on the same answers, each labelled good or bad", two, _kto(output, seed)),
        Planned("reward", "SFT, then a head that scores answers, trained on the same pairs", "", _reward(output, seed)),
        Planned("PPO", f"SFT, then PPO {own} the reward model", four, _ppo(output, seed), "the reward model's score"),
        Planned("GRPO", f"SFT, then GRPO {own} the judge's rules", two, _grpo(output, seed), "the judge's score"),
    ]


def _shared(seed: int) -> dict[str, Any]:
    return {"seed": seed, "remat": "none"}


def _base(output: Path, seed: int) -> SFTConfig:
    return SFTConfig(
        model=f"config:{output / 'world'}",
        data=str(output / "world" / "pretraining.jsonl"),
        output=output / "base",
        steps=PRETRAINING_STEPS,
        batch_size=BATCH,
        max_length=LENGTH,
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=50, weight_decay=0.1, b2=0.95),
        samples=SAMPLES,
        **_shared(seed),
    )


def _tuned(output: Path, seed: int) -> SFTConfig:
    return SFTConfig(
        model=str(output / "base" / "final"),
        data=str(output / "world" / "instructions.jsonl"),
        output=output / "sft",
        steps=SFT_STEPS,
        batch_size=BATCH,
        max_length=LENGTH,
        optimizer=OptimizerConfig(learning_rate=5e-4, warmup_steps=10),
        samples=SAMPLES,
        **_shared(seed),
    )


def _feedback(output: Path, seed: int) -> dict[str, Any]:
    return {
        "model": str(output / "sft" / "final"),
        "data": str(output / "world" / "preferences.jsonl"),
        "as_chat": True,
        "batch_size": BATCH,
        "max_length": LENGTH,
        **_shared(seed),
    }


def _dpo(output: Path, seed: int) -> DPOConfig:
    # Some rejected answers are true, only curt. Without the likelihood term (sft) DPO unlearns their facts as well.
    return DPOConfig(
        output=output / "dpo",
        algorithm=DPOAlgorithm("dpo(beta=0.3) + 2.0*sft"),
        steps=DPO_STEPS,
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=5),
        samples=SAMPLES,
        **_feedback(output, seed),
    )


def _kto(output: Path, seed: int) -> KTOConfig:
    return KTOConfig(
        output=output / "kto",
        algorithm=KTOAlgorithm("kto(beta=0.5)"),
        steps=KTO_STEPS,
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=5),
        samples=SAMPLES,
        **_feedback(output, seed),
    )


def _reward(output: Path, seed: int) -> RewardConfig:
    return RewardConfig(
        output=output / "reward",
        steps=REWARD_STEPS,
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=5),
        **_feedback(output, seed),
    )


def _own_answers(output: Path, seed: int) -> dict[str, Any]:
    return {
        "model": str(output / "sft" / "final"),
        "data": str(output / "world" / "questions.jsonl"),
        "as_chat": True,
        "max_length": 32,  # all questions fit (the longest has 12 tokens), so all batches have one shape
        "max_new_tokens": ANSWER,
        "slots": 128,
        "samples": SAMPLES,
        **_shared(seed),
    }


def _ppo(output: Path, seed: int) -> PPOConfig:
    return PPOConfig(
        output=output / "ppo",
        reward=f"reward_model(path={str(output / 'reward' / 'final')!r})",
        missing_end_penalty=1.0,
        # Many answers, each used for one update, teach more than few answers used for several. At twice the learning
        # rate the reward rises further, but the policy forgets facts.
        algorithm=PPOAlgorithm(kl_coef=0.1, epochs=1, minibatches=2),
        critic=CriticConfig(learning_rate=2e-4),
        steps=PPO_STEPS,
        batch_size=128,
        optimizer=OptimizerConfig(learning_rate=5e-5, schedule="linear", warmup_steps=2),
        **_own_answers(output, seed),
    )


def _grpo(output: Path, seed: int) -> GRPOConfig:
    return GRPOConfig(
        output=output / "grpo",
        reward="jaxalign.quickstart.judge:gold",
        algorithm=GRPOAlgorithm(kl_coef=0.02),
        steps=GRPO_STEPS,
        batch_size=32,
        n=8,
        optimizer=OptimizerConfig(learning_rate=7e-5, schedule="linear", warmup_steps=2),
        **_own_answers(output, seed),
    )
