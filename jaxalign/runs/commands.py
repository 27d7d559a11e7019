"""The commands that leave a run folder, and what each is told."""

from jaxalign.runs.config import DPOConfig, KTOConfig, RewardConfig, SFTConfig
from jaxalign.runs.rl_config import OnlineDPOConfig, PolicyConfig, PPOConfig, RLOOConfig

TRAINING: dict[str, type] = {
    "sft": SFTConfig,
    "dpo": DPOConfig,
    "kto": KTOConfig,
    "reward": RewardConfig,
    "ppo": PPOConfig,
    "grpo": PolicyConfig,
    "rloo": RLOOConfig,
    "online-dpo": OnlineDPOConfig,
}
