"""What the commands are told that learn from a model's own responses. Standard library only, as `runs/config.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jaxalign.runs.config import TrainConfig


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
    slots: int = 64
    """Responses generated side by side; one that ends makes room for the next prompt at once."""
    engine: str | None = None
    """Address of a server that draws the responses, http://host:port; by default the devices that train do."""
    engine_kind: Literal["vllm", "sglang"] = "vllm"
    """What the server is; rollout/servers.py says how it must be started."""
    engine_reload: str | None = None
    """Requests that make it load the policy, if not those of its kind: '/load {"path": "{folder}"} /reset_cache'."""


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
