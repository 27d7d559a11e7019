"""What the commands are told that learn from a model's own responses. Standard library only, as `runs/config.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jaxalign.runs.config import RefUpdateConfig, TrainConfig


@dataclass(frozen=True)
class RolloutConfig(TrainConfig):
    """How responses are drawn and rewarded."""

    reward: str = "numeric_match"
    """Of rollout/rewards.py: 'numeric_match + 0.1*length(target=60)', or 'my.module:function(x=1)'."""
    reward_seconds: float = 60.0
    """That a reward function may take for the responses of a step."""
    as_chat: bool = False
    """Text prompts are turns of the user: they are rendered with the chat template."""
    n: int = 8
    """Responses to each of the --batch-size prompts of a step."""
    max_new_tokens: int = 256
    """Length limit of a response, in tokens; --max-length is of prompt and response."""
    temperature: float = 1.0
    """That responses are drawn at; the policy that is trained is the tempered one."""
    missing_end_penalty: float = 0.0
    """Taken off the score of a response that did not end by itself."""
    length_penalty: float = 0.0
    """Taken off the score for each token of a response."""
    kl_budget: float | None = None
    """Nats a response from the reference beyond which the run ends, with the model as it is; by default it goes on."""
    slots: int = 64
    """Responses generated side by side; one that ends makes room for the next prompt at once."""
    decode_layout: Literal["tensor", "training"] = "tensor"
    """Of weights while responses are drawn: cut by mesh.tensor alone, or as in training and gathered for each token."""
    offload_reference: bool = False
    """Keep the reference in the host's memory, and on the devices only while it scores responses."""


@dataclass(frozen=True)
class PolicyAlgorithm:
    """What is made of responses and their scores; algorithms/policy.py names the papers' choices."""

    loss: str = "ppo_clip"
    """Of losses/policy.py: 'ppo_clip(clip_epsilon_high=0.28)', 'reinforce', 'cispo', or 'my.module:function(x=1)'."""
    advantages: Literal["group", "batch", "none", "leave_one_out"] = "group"
    """Scores less their prompt's mean: divided by the std of the prompt, of the batch, not at all; or RLOO's."""
    aggregate: Literal["token", "sequence", "fixed"] = "token"
    """Mean over tokens (DAPO), over responses of their means (GRPO), or sums over a fixed length (Dr. GRPO)."""
    level: Literal["token", "sequence"] = "token"
    """Ratios of tokens, or of whole responses (GSPO)."""
    kl_coef: float = 0.0
    """Weight of KL(policy || reference) in the loss, per nat."""
    kl_estimator: Literal["k2", "k3"] = "k3"
    """How the KL of the loss is estimated from the drawn tokens."""
    reference: bool = True
    """Hold the model that training starts from beside the policy, to log how far the policy has gone."""
    epochs: int = 1
    """Passes over the responses of a step."""
    minibatches: int = 1
    """Optimizer updates in each pass."""


@dataclass(frozen=True)
class PolicyConfig(RolloutConfig):
    """Group-relative policy optimisation (GRPO, DAPO, Dr. GRPO, GSPO, CISPO): rewards for a model's own responses."""

    algorithm: PolicyAlgorithm = field(default_factory=PolicyAlgorithm)


@dataclass(frozen=True)
class RLOOConfig(PolicyConfig):
    """REINFORCE with leave-one-out baselines (RLOO): rewards for a model's own responses, without clipping."""

    algorithm: PolicyAlgorithm = field(
        default_factory=lambda: PolicyAlgorithm(loss="reinforce", advantages="leave_one_out", aggregate="fixed")
    )


@dataclass(frozen=True)
class PPOAlgorithm:
    """What is made of responses and their scores; algorithms/ppo.py says where each choice comes from."""

    loss: str = "ppo_clip"
    """Of losses/policy.py: 'ppo_clip(clip_epsilon=0.2, dual_clip=3.0)', or 'my.module:function(x=1)'."""
    kl_coef: float = 0.05
    """Reward for a nat of KL(policy || reference)."""
    kl_target: float | None = None
    """Nats a response that the KL coefficient is adapted to; by default it is fixed."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """How the KL is estimated from the drawn tokens."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the KL is paid: token by token in the reward, or in the loss."""
    gamma: float = 1.0
    """Discount of a token."""
    gae_lambda: float = 0.95
    """1 trusts the returns, 0 the critic."""
    value_coef: float = 0.1
    """Weight of the value loss."""
    value_clip_epsilon: float | None = 0.2
    """How far values move in a step, in the unit of rewards; None: freely."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus, per nat."""
    whiten_advantages: bool = True
    """Advantages of mean 0 and variance 1 over the tokens of a step."""
    whiten_rewards: bool = False
    """Rewards of variance 1 over the tokens of a step, their mean as it is."""
    normalise_scores: bool = False
    """Scores less their mean so far, over their standard deviation so far."""
    clip_scores: float | None = None
    """Scores within plus or minus this, after that."""
    pretraining_coef: float = 0.0
    """Weight of the cross-entropy of --pretraining-data (PPO-ptx)."""
    halt_kl: float | None = None
    """No more updates of a step beyond 1.5 times this, in nats a token from the policy that drew."""
    epochs: int = 4
    """Passes over the responses of a step."""
    minibatches: int = 1
    """Optimizer updates in each pass."""


@dataclass(frozen=True)
class CriticConfig:
    """The model that says what a response will still earn."""

    model: str | None = None
    """What it starts from, a reward model or a language model; by default --reward's reward model, else --model."""
    shared: bool = False
    """A head on the policy's own hidden states, in place of a model of its own."""
    learning_rate: float | None = None
    """Peak learning rate; by default the policy's."""


@dataclass(frozen=True)
class PPOConfig(RolloutConfig):
    """Proximal policy optimisation (PPO) with a critic: rewards for a model's own responses."""

    n: int = 1
    """Responses to each of the --batch-size prompts of a step."""
    pretraining_data: str | None = None
    """Text that stays likely while rewards rise, as --data of jaxalign sft; with --algorithm.pretraining-coef."""
    ref_update: RefUpdateConfig = field(default_factory=RefUpdateConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    algorithm: PPOAlgorithm = field(default_factory=PPOAlgorithm)
