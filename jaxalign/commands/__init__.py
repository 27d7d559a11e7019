"""Commands: one file each, read from top to bottom, and the one table of all of them.

The command line, the model card, export, the quickstart and the documentation read `COMMANDS`. Modules are named, not
imported, so that `jaxalign --help` answers at once.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxalign.config.inference import ChatConfig, ExportConfig, GenerateConfig, QuickstartConfig
from jaxalign.config.offline import DPOConfig, KTOConfig, RewardConfig, SFTConfig
from jaxalign.config.on_policy import GRPOConfig, OnlineDPOConfig, PPOConfig, RLOOConfig


class Command(NamedTuple):
    """A subcommand of the program."""

    config: type  # the settings that it obeys
    module: str  # its `main(config)` runs it and returns the exit status; a training command also has `recipe`
    trains: bool = False  # it leaves a run folder
    policy: str = ""  # where the exported model lies among the trained parameters: "policy" beside a critic

    def load(self) -> Callable[[Any], int]:
        """Its `main`, imported now."""
        return importlib.import_module(self.module).main


COMMANDS: dict[str, Command] = {
    "sft": Command(SFTConfig, "jaxalign.commands.sft", trains=True),
    "dpo": Command(DPOConfig, "jaxalign.commands.dpo", trains=True),
    "kto": Command(KTOConfig, "jaxalign.commands.kto", trains=True),
    "reward": Command(RewardConfig, "jaxalign.commands.reward", trains=True),
    "ppo": Command(PPOConfig, "jaxalign.commands.ppo", trains=True, policy="policy"),
    "grpo": Command(GRPOConfig, "jaxalign.commands.grpo", trains=True),
    "rloo": Command(RLOOConfig, "jaxalign.commands.grpo", trains=True),
    "online-dpo": Command(OnlineDPOConfig, "jaxalign.commands.online_dpo", trains=True),
    "generate": Command(GenerateConfig, "jaxalign.commands.generate"),
    "chat": Command(ChatConfig, "jaxalign.commands.chat.chat"),
    "export": Command(ExportConfig, "jaxalign.commands.export"),
    "quickstart": Command(QuickstartConfig, "jaxalign.quickstart.pipeline"),
}


def name_of(config: Any) -> str:
    """The command whose settings these are: an exact match of the class, so that rloo is not taken for grpo."""
    return next(name for name, command in COMMANDS.items() if command.config is type(config))
