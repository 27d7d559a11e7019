"""What the commands are told that learn from a model's own responses. Standard library only, as `runs/config.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jaxalign.runs.config import RefUpdateConfig, TrainConfig


@dataclass(frozen=True)
class RolloutConfig(TrainConfig):
    """How responses are drawn and rewarded."""

    reward: str = "numeric_match"
    """Of rollout/rewards/functions.py: 'numeric_match + 0.1*length(target=60)', or 'my.module:function(x=1)'."""
    reward_seconds: float = 60.0
    """That the reward functions, side by side, may take for the responses of a step."""
    reward_clip: float | None = None
    """The sum of --reward is cut to this much on either side of 0, before penalties; by default not."""
    as_chat: bool = False
    """Text prompts are turns of the user: they are rendered with the chat template."""
    n: int = 8
    """Responses to each of the --batch-size prompts of a step."""
    max_new_tokens: int = 256
    """Length limit of a response, in tokens; --max-length is of prompt and response."""
    temperature: float = 1.0
    """That responses are drawn at; the policy that is trained is the tempered one."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens that holds this share of the probability."""
    top_k: int = 0
    """Draw from the k most likely tokens; 0: from all."""
    min_p: float = 0.0
    """Draw from tokens at least this share as likely as the most likely one; 0: from all."""
    missing_end_penalty: float = 0.0
    """Taken off the score of a response that did not end by itself."""
    length_penalty: float = 0.0
    """Taken off the score for each token of a response."""
    kl_budget: float | None = None
    """Nats a response from the reference beyond which the run ends, with the model as it is; by default it goes on."""
    slots: int = 64
    """Responses generated side by side; one that ends makes room for the next prompt at once."""
    engine: str | None = None
    """Address of a server that draws the responses, http://host:port; by default the devices that train do."""
    engine_kind: Literal["vllm", "sglang"] = "vllm"
    """What the server is; rollout/engine/servers.py says how it must be started."""
    engine_reload: str | None = None
    """Requests that make it load the policy, if not those of its kind: '/load {"path": "{folder}"} /reset_cache'."""
    decode_layout: Literal["tensor", "training"] = "tensor"
    """Of weights while responses are drawn: cut by mesh.tensor alone, or as in training and gathered for each token."""
    offload_reference: bool = False
    """Keep the reference in the host's memory, and on the devices only while it scores responses."""


@dataclass(frozen=True)
class PolicyAlgorithm:
    """What is made of responses and their scores; algorithms/policy_gradient.py names the papers' choices."""

    loss: str = "ppo_clip"
    """Of losses/policy.py: 'ppo_clip(clip_epsilon_high=0.28)', 'reinforce', 'cispo', or 'my.module:function(x=1)'."""
    advantages: Literal["group", "batch", "none", "leave_one_out", "decoupled"] = "group"
    """Scores less their prompt's mean: over the std of the prompt, of the batch, not divided; RLOO's; or GDPO's."""
    aggregate: Literal["token", "sequence", "fixed"] = "token"
    """Mean over tokens (DAPO), over responses of their means (GRPO), or sums over a fixed length (Dr. GRPO)."""
    level: Literal["token", "sequence"] = "token"
    """Ratios of tokens, or of whole responses (GSPO)."""
    kl_coef: float = 0.0
    """Weight of KL(policy || reference) in the loss, per nat."""
    kl_estimator: Literal["k2", "k3"] = "k3"
    """How the KL of the loss is estimated from the drawn tokens."""
    importance_cap: float = 2.0
    """The most that a token weighs where another distribution than the policy's drew it (--top-p and so on)."""
    reference: bool = True
    """Hold the model that training starts from beside the policy, to log how far the policy has gone."""
    epochs: int = 1
    """Passes over the responses of a step."""
    minibatches: int = 1
    """Optimizer updates in each pass."""


@dataclass(frozen=True)
class GroupConfig(RolloutConfig):
    """How responses to one prompt are compared with each other."""

    dynamic_sampling: int = 0
    """Rounds of generation a step, at most, to put others in place of prompts of equal scores (DAPO); 0: they stay."""


@dataclass(frozen=True)
class PolicyConfig(GroupConfig):
    """Group-relative policy optimisation (GRPO, DAPO, Dr. GRPO, GSPO, CISPO): rewards for a model's own responses."""

    algorithm: PolicyAlgorithm = field(default_factory=PolicyAlgorithm)


@dataclass(frozen=True)
class RLOOConfig(PolicyConfig):
    """REINFORCE with leave-one-out baselines (RLOO): rewards for a model's own responses, without clipping."""

    algorithm: PolicyAlgorithm = field(
        default_factory=lambda: PolicyAlgorithm(loss="reinforce", advantages="leave_one_out", aggregate="fixed")
    )


@dataclass(frozen=True)
class OnlineDPOAlgorithm:
    """What is minimised over pairs of the policy's own responses."""

    loss: str = "dpo"
    """Of losses/pairs/margin.py: 'ipo(beta=0.05)', a sum 'dpo(beta=0.1) + 0.2*sft', or 'my.module:function(x=1)'."""
    epochs: int = 1
    """Passes over the pairs of a step."""
    minibatches: int = 1
    """Optimizer updates in each pass."""


@dataclass(frozen=True)
class OnlineDPOConfig(GroupConfig):
    """Online DPO: pairs of a model's own responses, the best and the worst to each prompt by the reward."""

    n: int = 2
    """Responses to each of the --batch-size prompts of a step; the best and the worst are a pair."""
    algorithm: OnlineDPOAlgorithm = field(default_factory=OnlineDPOAlgorithm)


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
