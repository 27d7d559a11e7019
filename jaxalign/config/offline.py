"""Settings of the commands that learn from a fixed data set: sft, dpo, kto, reward."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from jaxalign.config.limits import FUNCTION, at_least
from jaxalign.config.shared import (
    ChatRowSettings,
    KernelCheckSettings,
    OfflineConfig,
    OptimizerConfig,
    RefUpdateConfig,
    SampleSettings,
)


@dataclass(frozen=True)
class SFTAlgorithm:
    """The loss of a token."""

    loss: Annotated[str, FUNCTION] = "cross_entropy"
    """Loss per token: 'cross_entropy(label_smoothing=0.1)', 'dft', a sum, or your own 'my.module:function'."""


@dataclass(frozen=True, kw_only=True)
class SFTConfig(ChatRowSettings, SampleSettings, KernelCheckSettings, OfflineConfig):
    """Supervised fine-tuning; with --model config:PATH, pretraining from scratch."""

    default_learning_rate: ClassVar[float] = 2e-5  # Taori et al. 2023, https://github.com/tatsu-lab/stanford_alpaca

    renamed: ClassVar[dict[str, str]] = {"loss": "algorithm.loss"}

    turns: Literal["all", "last"] = "all"
    """Assistant turns of a conversation that are learned: 'all', or only the 'last'."""
    long_text: Literal["truncate", "split"] = "truncate"
    """Texts beyond --max-length: 'truncate' keeps their first tokens, 'split' makes rows; .txt files are split."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW, schedule, clipping. Default learning rate: 2e-5 (Alpaca); with LoRA 2e-4 (QLoRA)."""
    algorithm: SFTAlgorithm = field(default_factory=SFTAlgorithm)


@dataclass(frozen=True)
class FeedbackAlgorithm:
    """The loss of a pair or of a rated response."""

    loss: Annotated[str, FUNCTION] = ""
    """Loss per pair or per response."""


@dataclass(frozen=True)
class DPOAlgorithm(FeedbackAlgorithm):
    """The loss of a pair."""

    loss: Annotated[str, FUNCTION] = "dpo"
    """Loss per pair: 'dpo(beta=0.1)', 'ipo', a sum 'dpo + 0.2*sft', or your own 'my.module:function(x=1)'."""


@dataclass(frozen=True)
class KTOAlgorithm(FeedbackAlgorithm):
    """The loss of a rated response."""

    loss: Annotated[str, FUNCTION] = "kto"
    """Loss per response: 'kto(beta=0.1, lambda_d=1.33)', a sum, or your own 'my.module:function(x=1)'."""


@dataclass(frozen=True, kw_only=True)
class FeedbackConfig(ChatRowSettings, SampleSettings, KernelCheckSettings, OfflineConfig):
    """Settings that dpo and kto share."""

    ref_model: str | None = None
    """Folder or hub name of the frozen reference; none: --model. With LoRA leave it out."""
    precompute_reference: bool = False
    """Compute the reference's log-probabilities before training, so that one model is held."""
    ref_update: RefUpdateConfig = field(default_factory=RefUpdateConfig)
    algorithm: FeedbackAlgorithm = field(default_factory=FeedbackAlgorithm)


@dataclass(frozen=True, kw_only=True)
class DPOConfig(FeedbackConfig):
    """Direct preference optimisation and its family, from pairs of responses."""

    default_learning_rate: ClassVar[float] = 5e-7  # Tunstall et al. 2023, https://arxiv.org/abs/2310.16944

    batch_size: Annotated[int, at_least(1)] = 8
    """Number of pairs per step, over all devices."""
    share_prompt: bool = False
    """Compute a prompt once for both responses where they fit in a row; not with splash or --no-packing."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW, schedule, clipping. Default learning rate: 5e-7 (Zephyr); with LoRA 5e-6 (its recipe)."""
    algorithm: DPOAlgorithm = field(default_factory=DPOAlgorithm)


@dataclass(frozen=True, kw_only=True)
class KTOConfig(FeedbackConfig):
    """Kahneman-Tversky optimisation and its family, from responses that are rated good or bad."""

    default_learning_rate: ClassVar[float] = 5e-7  # TRL 1.16, scripts/kto.py

    batch_size: Annotated[int, at_least(1)] = 8
    """Number of rated responses per step, over all devices; at least 2."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW, schedule, clipping. Default learning rate: 5e-7 (TRL's recipe); with LoRA 5e-6 (x 10, Schulman 2025)."""
    algorithm: KTOAlgorithm = field(default_factory=KTOAlgorithm)


@dataclass(frozen=True)
class RewardAlgorithm:
    """The loss of a group of compared responses."""

    loss: Annotated[str, FUNCTION] = "bradley_terry"
    """Loss per group: 'bradley_terry(margin=0.1)', 'kwise', 'process', a sum, or your own 'my.module:function'."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig(ChatRowSettings, OfflineConfig):
    """Reward models, from pairs or rankings of responses."""

    default_learning_rate: ClassVar[float] = 9e-6  # Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, appendix C

    retired: ClassVar[tuple[str, ...]] = ("samples", "implementation", "check_kernels")

    batch_size: Annotated[int, at_least(1)] = 8
    """Number of pairs or rankings per step, over all devices."""
    members: Annotated[int, at_least(1)] = 1
    """Number of ensemble members: heads on one trunk, or with --lora.rank an adapter and a head each."""
    combine: Annotated[str, FUNCTION] = "mean"
    """Score of the ensemble out of its members': 'mean', 'min' or 'mean_minus_std(k=1.0)'."""
    step_separator: str = "\n"
    """Text that ends a solution step, for the losses 'process' and 'process_mse'; default: a line break."""
    freeze_trunk: bool = False
    """Train the heads only, on a trunk that stays as it is."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW, schedule, clipping. Default learning rate: 9e-6 (InstructGPT); with LoRA 9e-5 (x 10, Schulman 2025)."""
    algorithm: RewardAlgorithm = field(default_factory=RewardAlgorithm)
