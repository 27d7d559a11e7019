"""Settings of the commands that learn from a model's own responses: ppo, grpo, rloo, online-dpo."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from jaxalign.config.limits import FUNCTION, WORDS, above, at_least, share
from jaxalign.config.shared import (
    ChatRowSettings,
    LogpSettings,
    OptimizerConfig,
    PromptSettings,
    RefUpdateConfig,
    TrainConfig,
    TruncationSettings,
)

Advantages = Literal["group", "batch", "scores", "none", "leave_one_out", "decoupled", "global"]
NEVER_OBEYED = ("eval_data", "eval_share", "packing", "check_kernels", "checkpoint.keep_best")


@dataclass(frozen=True)
class UpdateSettings:
    """The loss, and the updates of a step."""

    loss: Annotated[str, FUNCTION] = ""
    """Loss per token or per pair."""
    epochs: Annotated[int, at_least(1)] = 1
    """Number of passes over the responses of a step."""
    minibatches: Annotated[int, at_least(1)] = 1
    """Number of optimizer updates in each pass."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(PromptSettings, ChatRowSettings, LogpSettings, TrainConfig):
    """Settings of generation and rewards."""

    retired: ClassVar[tuple[str, ...]] = NEVER_OBEYED
    reworded: ClassVar[dict[str, dict[str, str]]] = {"decode_layout": {"tensor": "auto"}}  # the default's name

    steps: Annotated[int | None, at_least(1)] = None
    """Number of steps, each a batch of responses and epochs x minibatches updates; none: see --epochs."""
    epochs: Annotated[float, above(0)] = 1.0
    """Number of passes over the prompts, when --steps is not given."""
    batch_size: Annotated[int, at_least(1)] = 8
    """Number of prompts per step, over all devices."""
    reward: Annotated[str, FUNCTION] = "numeric_match"
    """Reward of a response: built-in functions 'numeric_match + 0.1*length(target=60)', a reward model\
 'reward_model(path="rm/final")', or your own 'my.module:function(x=1)'."""
    reward_seconds: Annotated[float, above(0)] = 60.0
    """Time limit, in seconds, of reward functions for one step's responses; the run ends beyond it, after a\
 checkpoint. They run in parallel. Reward models have no limit."""
    reward_clip: Annotated[float | None, above(0)] = None
    """Largest absolute sum of --reward, which is clipped to it before penalties; none: no clipping."""
    n: Annotated[int, at_least(1)] = 8
    """Number of responses to each prompt."""
    max_new_tokens: Annotated[int, at_least(1)] = 256
    """Length limit of a response, in tokens; --max-length limits prompt and response together."""
    temperature: Annotated[float, at_least(0)] = 1.0
    """Sampling temperature, above 0. Losses use log-probabilities at the same temperature."""
    missing_end_penalty: Annotated[float, at_least(0)] = 0.0
    """Amount subtracted from the score of a response that did not end by itself."""
    length_penalty: float = 0.0
    """Amount subtracted from a response's score for each of its tokens."""
    samples: Annotated[int, at_least(0)] = 4
    """Number of prompts per step whose first response is written to samples.jsonl, with its score."""
    eval_every: Annotated[int, at_least(0)] = 0
    """Number of steps between written samples; 0 writes those of the first step only."""
    slots: Annotated[int | None, at_least(1)] = None
    """Number of responses generated at once; one that ends makes room for the next prompt. None: all of a step, but no\
 more than 64 for each device."""
    engine: Annotated[str | None, WORDS] = None
    """Address of a server that generates, http://host:port; none: the training devices do."""
    engine_kind: Literal["vllm", "sglang"] = "vllm"
    """Software of --engine's server; rollout/engine/servers.py has its start command."""
    engine_reload: str | None = None
    """Requests that make the server load a policy: '/load {"path": "{folder}"} /reset'; none: --engine-kind's."""
    decode_layout: Literal["auto", "tensor", "training"] = "auto"
    """Weights in generation: a copy split over as many devices as divide the key heads, at most 8 ('auto'), or over\
 --mesh.tensor alone ('tensor'), or as in 'training', gathered anew for every token (slow, least memory)."""
    offload_reference: bool = False
    """Keep the reference in the host's memory, and on the devices only while it scores responses."""
    algorithm: UpdateSettings = field(default_factory=UpdateSettings)


@dataclass(frozen=True, kw_only=True)
class KLBudgetSettings:
    """Settings of commands that measure the KL to the reference."""

    kl_budget: Annotated[float | None, above(0)] = None
    """End the run, keeping its model, above this KL(policy || reference) in nats per response; none: no limit."""


@dataclass(frozen=True)
class GRPOAlgorithm(UpdateSettings):
    """The update of a policy without a critic; algorithms/policy_gradient.py names the papers' choices."""

    loss: Annotated[str, FUNCTION] = "ppo_clip"
    """Loss per token: 'ppo_clip(clip_epsilon_high=0.28)', 'reinforce', 'cispo', or your own 'my.module:function'."""
    advantages: Advantages = "group"
    """Advantage of a response: its score minus the prompt's mean, over the prompt's std ('group', GRPO), the std of\
 these differences in the batch ('batch', REINFORCE++ with baseline), the std of all scores ('scores', TRL's\
 scale_rewards='batch') or nothing ('none', Dr. GRPO); 'leave_one_out' (RLOO): minus the others' mean; 'decoupled'\
 (GDPO): each reward function by itself; 'global' (REINFORCE++): minus the batch's mean, over its std; --n may be 1."""
    aggregate: Literal["token", "sequence", "fixed"] = "token"
    """Mean of the loss: of all tokens ('token', DAPO), of each response's mean ('sequence', GRPO), or of sums over\
 --max-new-tokens ('fixed', Dr. GRPO)."""
    level: Literal["token", "sequence"] = "token"
    """Unit of the probability ratio: each 'token', or the whole 'sequence' (GSPO)."""
    kl_coef: Annotated[float, at_least(0)] = 0.0
    """Weight of KL(policy || reference) in the loss, per nat."""
    kl_estimator: Literal["k2", "k3"] = "k3"
    """Estimator of --algorithm.kl-coef's KL."""
    importance_cap: Annotated[float, above(0)] = 2.0
    """Largest importance weight of a token that was not sampled from the policy itself (--top-p, --engine)."""
    reference: bool = True
    """Hold the starting model beside the policy, to log the KL between the two."""


@dataclass(frozen=True, kw_only=True)
class GroupConfig(TruncationSettings, RolloutConfig):
    """Settings of commands that compare responses to one prompt."""

    dynamic_sampling: Annotated[int, at_least(0)] = 0
    """Largest number of rounds per step that replace prompts whose responses score alike (DAPO); 0 keeps them."""


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(KLBudgetSettings, GroupConfig):
    """Group-relative policy optimisation (GRPO, DAPO, Dr. GRPO, GSPO, CISPO) on a model's own responses."""

    default_learning_rate: ClassVar[float] = 1e-6  # Shao et al. 2024, https://arxiv.org/abs/2402.03300, section 4.2

    reworded: ClassVar[dict[str, dict[str, str]]] = {
        **RolloutConfig.reworded,
        "algorithm.advantages": {"batch": "scores"},
    }

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW, schedule, clipping. Default learning rate: 1e-6 (DeepSeekMath); with LoRA 1e-5 (x 10, Schulman 2025)."""
    algorithm: GRPOAlgorithm = field(default_factory=GRPOAlgorithm)


@dataclass(frozen=True)
class RLOOAlgorithm(GRPOAlgorithm):
    """The update of a policy without a critic; algorithms/policy_gradient.py names the papers' choices."""

    loss: Annotated[str, FUNCTION] = "reinforce"
    """Loss per token: 'reinforce', 'ppo_clip', 'cispo', or your own 'my.module:function(x=1)'."""
    advantages: Advantages = "leave_one_out"
    """Advantage of a response: 'leave_one_out' subtracts the mean score of the prompt's other responses; for the\
 others see jaxalign grpo --help."""
    aggregate: Literal["token", "sequence", "fixed"] = "fixed"
    """Mean of the loss: of sums over --max-new-tokens ('fixed'), of all tokens ('token'), or of each response's\
 mean ('sequence')."""


@dataclass(frozen=True, kw_only=True)
class RLOOConfig(GRPOConfig):
    """REINFORCE with leave-one-out baselines (RLOO) on a model's own responses, without clipping."""

    default_learning_rate: ClassVar[float] = 1e-6  # Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW, schedule, clipping. Default learning rate: 1e-6 (Ahmadian 2024); with LoRA 1e-5 (x 10, Schulman 2025)."""
    algorithm: RLOOAlgorithm = field(default_factory=RLOOAlgorithm)


@dataclass(frozen=True)
class OnlineDPOAlgorithm(UpdateSettings):
    """The loss of a pair of the policy's own responses."""

    loss: Annotated[str, FUNCTION] = "dpo"
    """Loss per pair: 'dpo(beta=0.1)', 'ipo', a sum 'dpo + 0.2*sft', or your own 'my.module:function(x=1)'."""
    epochs: Annotated[int, at_least(1)] = 1
    """Number of passes over the pairs of a step."""


@dataclass(frozen=True, kw_only=True)
class OnlineDPOConfig(GroupConfig):
    """Online DPO: the best and the worst of a model's own responses to a prompt are a pair."""

    default_learning_rate: ClassVar[float] = 5e-7  # Guo et al. 2024, https://arxiv.org/abs/2402.04792

    retired: ClassVar[tuple[str, ...]] = (*NEVER_OBEYED, "kl_budget")

    n: Annotated[int, at_least(1)] = 2
    """Number of responses to each prompt, at least 2; the best and the worst by the reward are a pair."""
    temperature: Annotated[float, at_least(0)] = 1.0
    """Sampling temperature, above 0. The loss uses log-probabilities at temperature 1."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW, schedule, clipping. Default learning rate: 5e-7 (Guo 2024); with LoRA 5e-6 (x 10, Schulman 2025)."""
    algorithm: OnlineDPOAlgorithm = field(default_factory=OnlineDPOAlgorithm)


@dataclass(frozen=True)
class PPOAlgorithm(UpdateSettings):
    """The update of policy and critic; algorithms/ppo.py says where each choice comes from."""

    loss: Annotated[str, FUNCTION] = "ppo_clip"
    """Loss per token: 'ppo_clip(clip_epsilon=0.2, dual_clip=3.0)', or your own 'my.module:function(x=1)'."""
    kl_coef: Annotated[float, at_least(0)] = 0.05
    """Weight of KL(policy || reference), in reward per nat."""
    kl_target: Annotated[float | None, above(0)] = None
    """KL(policy || reference), in nats per response, that --algorithm.kl-coef is adapted to; none: it is fixed."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the KL from the sampled tokens."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Place of the KL penalty: token by token in the 'reward', or in the 'loss'."""
    score_at: Literal["last", "after"] = "last"
    """Position that earns the score: a response's 'last' token, or the one 'after' it (TRL), whose value counts then\
 too; a response of --max-new-tokens has none after it."""
    gamma: Annotated[float, share()] = 1.0
    """Discount per token."""
    gae_lambda: Annotated[float, share()] = 0.95
    """Lambda of GAE, 0 (TD error) to 1 (return minus value)."""
    value_coef: Annotated[float, at_least(0)] = 0.1
    """Weight of the value loss."""
    value_clip_epsilon: Annotated[float | None, above(0)] = 0.2
    """Largest change of a value per step, in units of reward; none: no clipping."""
    entropy_coef: Annotated[float, at_least(0)] = 0.0
    """Weight of the entropy bonus, per nat."""
    whiten_advantages: bool = True
    """Shift and scale advantages to mean 0 and variance 1 over the tokens of a step."""
    whiten_rewards: bool = False
    """Scale rewards to variance 1 over the tokens of a step; their mean stays."""
    normalise_scores: bool = False
    """Subtract the mean of all scores so far, and divide by their standard deviation."""
    clip_scores: Annotated[float | None, above(0)] = None
    """Largest absolute score, after normalisation; larger ones are clipped to it; none: no clipping."""
    pretraining_coef: Annotated[float, at_least(0)] = 0.0
    """Weight of the cross-entropy of --pretraining-data (PPO-ptx)."""
    halt_kl: Annotated[float | None, above(0)] = None
    """Skip a step's other updates above 1.5 times this KL from the sampling policy, in nats per token; none: never."""
    epochs: Annotated[int, at_least(1)] = 4
    """Number of passes over the responses of a step."""


@dataclass(frozen=True)
class CriticConfig:
    """The critic: a model that predicts the reward still to come."""

    model: str | None = None
    """Reward or language model that the critic starts from; none: the reward model of --reward, else --model."""
    shared: bool = False
    """Use a head on the policy's own hidden states as critic, in place of a separate model."""
    bias: bool = True
    """Add a trained bias to the critic's head; TRL's has none."""
    learning_rate: Annotated[float | None, at_least(0)] = None
    """Peak learning rate of the critic; none: the policy's."""


@dataclass(frozen=True, kw_only=True)
class PPOConfig(KLBudgetSettings, RolloutConfig):
    """Proximal policy optimisation (PPO) with a critic, on a model's own responses."""

    default_learning_rate: ClassVar[float] = 3e-6  # Huang et al. 2024, https://arxiv.org/abs/2403.17031

    retired: ClassVar[tuple[str, ...]] = (*NEVER_OBEYED, "top_p", "top_k", "min_p")

    n: Annotated[int, at_least(1)] = 1
    """Number of responses to each prompt."""
    pretraining_data: str | None = None
    """Text to train on besides, given as sft's --data; needs --algorithm.pretraining-coef; none: no text."""
    ref_update: RefUpdateConfig = field(default_factory=RefUpdateConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW, schedule, clipping. Default learning rate: 3e-6 (Huang 2024); with LoRA 3e-5 (x 10, Schulman 2025)."""
    algorithm: PPOAlgorithm = field(default_factory=PPOAlgorithm)
