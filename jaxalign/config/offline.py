"""Settings of the commands that learn from a fixed data set: sft, dpo, kto, reward."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from jaxalign.config.limits import at_least
from jaxalign.config.shared import (
    ChatRowSettings,
    KernelCheckSettings,
    OfflineConfig,
    RefUpdateConfig,
    SampleSettings,
)


@dataclass(frozen=True)
class SFTAlgorithm:
    """The loss of a token."""

    loss: str = "cross_entropy"
    """Loss per token, from losses/language.py: 'cross_entropy(label_smoothing=0.1, z_loss=1e-4)', 'dft', a sum, or your
    own 'my.module:function'."""


@dataclass(frozen=True, kw_only=True)
class SFTConfig(SampleSettings, KernelCheckSettings, OfflineConfig):
    """Supervised fine-tuning; with --model config:PATH, pretraining from scratch."""

    renamed: ClassVar[dict[str, str]] = {"loss": "algorithm.loss"}

    turns: Literal["all", "last"] = "all"
    """Assistant turns of a conversation that are learned: 'all', or only the 'last'."""
    long_text: Literal["truncate", "split"] = "truncate"
    """Treatment of texts longer than --max-length: 'truncate' keeps their first tokens, 'split' makes several rows.
    Plain text files are always split."""
    algorithm: SFTAlgorithm = field(default_factory=SFTAlgorithm)


@dataclass(frozen=True)
class FeedbackAlgorithm:
    """The loss of a pair or of a rated response."""

    loss: str = ""
    """Loss per pair or per response."""


@dataclass(frozen=True)
class DPOAlgorithm(FeedbackAlgorithm):
    """The loss of a pair."""

    loss: str = "dpo"
    """Loss per pair, from losses/pairs: 'ipo(beta=0.05)', a sum 'dpo(beta=0.1) + 0.2*sft', or your own
    'my.module:function(x=1)'."""


@dataclass(frozen=True)
class KTOAlgorithm(FeedbackAlgorithm):
    """The loss of a rated response."""

    loss: str = "kto"
    """Loss per response, from losses/unpaired.py: 'kto(beta=0.1, lambda_d=1.33)', a sum, or your own
    'my.module:function(x=1)'."""


@dataclass(frozen=True, kw_only=True)
class FeedbackConfig(ChatRowSettings, SampleSettings, KernelCheckSettings, OfflineConfig):
    """Settings that dpo and kto share."""

    ref_model: str | None = None
    """Folder or hub name of the frozen reference. Default: --model. With LoRA it is always the base."""
    precompute_reference: bool = False
    """Compute the reference's log-probabilities once before training, which then holds a single model."""
    ref_update: RefUpdateConfig = field(default_factory=RefUpdateConfig)
    algorithm: FeedbackAlgorithm = field(default_factory=FeedbackAlgorithm)


@dataclass(frozen=True, kw_only=True)
class DPOConfig(FeedbackConfig):
    """Direct preference optimisation and its family, from pairs of responses."""

    batch_size: Annotated[int, at_least(1)] = 8
    """Number of pairs per step, over all devices."""
    share_prompt: bool = False
    """Compute a pair's prompt once, where both responses fit behind it in a row. Needs XLA's attention or cuDNN's."""
    algorithm: DPOAlgorithm = field(default_factory=DPOAlgorithm)


@dataclass(frozen=True, kw_only=True)
class KTOConfig(FeedbackConfig):
    """Kahneman-Tversky optimisation and its family, from responses that are rated good or bad."""

    batch_size: Annotated[int, at_least(1)] = 8
    """Number of rated responses per step, over all devices; at least 2."""
    algorithm: KTOAlgorithm = field(default_factory=KTOAlgorithm)


@dataclass(frozen=True)
class RewardAlgorithm:
    """The loss of a group of compared responses."""

    loss: str = "bradley_terry"
    """Loss per group, from losses/ranking.py: 'bradley_terry(margin=0.1, centering_coef=0.01)', 'kwise', 'process' (one
    score per solution step), a sum, or your own 'my.module:function(x=1)'."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig(ChatRowSettings, OfflineConfig):
    """Reward models, from pairs or rankings of responses."""

    retired: ClassVar[tuple[str, ...]] = ("samples", "implementation", "check_kernels")

    batch_size: Annotated[int, at_least(1)] = 8
    """Number of pairs or rankings per step, over all devices."""
    members: Annotated[int, at_least(1)] = 1
    """Number of ensemble members: heads on one shared trunk, or with --lora.rank one adapter and head each. Their
    disagreement is logged."""
    combine: str = "mean"
    """Rule by which programs that load the model combine the members' scores: 'mean', 'min' or
    'mean_minus_std(k=1.0)'."""
    step_separator: str = "\n"
    """Text that ends each solution step; the step is scored at its last token. Only for the losses 'process' and
    'process_mse'."""
    freeze_trunk: bool = False
    """Train the heads only, on a trunk that stays as it is."""
    algorithm: RewardAlgorithm = field(default_factory=RewardAlgorithm)
