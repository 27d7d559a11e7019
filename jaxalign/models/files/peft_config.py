"""An adapter_config.json of PEFT: every key is read, or known to change nothing, or refused by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from jaxalign.mistake import Mistake
from jaxalign.outside import Fields, brief

CONFIG = "adapter_config.json"
# Keys of adapter_config.json that the function of a loaded adapter does not depend on: names, training, initial values.
HARMLESS_KEYS = """
    auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config fan_in_fan_out inference_mode
    loftq_config lora_dropout lora_ga_config megatron_core peft_version qalora_group_size revision runtime_config
    task_type
"""
# Keys that change it and have no place in `Lora`, with the values besides null, false and nothing that turn them off.
UNSUPPORTED: dict[str, tuple] = {
    "bias": ("none",),
    "modules_to_save": (),
    "layers_to_transform": (),
    "layers_pattern": (),
    "layer_replication": (),
    "trainable_token_indices": (),
    "target_parameters": (),
    "lora_bias": (),
    "use_qalora": (),
    "use_bdlora": (),
    "alora_invocation_tokens": (),
    "arrow_config": (),
    "kasa_config": (),
    "megatron_config": (),
    "monteclora_config": (),
    "velora_config": (),
}
# Values of init_lora_weights that leave the base as it is; all others take the first A B out of it.
HARMLESS_INITS = ("gaussian", "eva", "orthogonal", "mica")
MOST_REPEATS = 6  # of a regular expression in a config, so that matching ends


class PeftConfig(NamedTuple):
    """The content of an adapter_config.json: which modules are adapted, with rank and scale."""

    rank: int
    alpha: float
    rslora: bool
    dora: bool
    targets: str | list[str]
    excluded: str | list[str]
    ranks: dict[str, int]  # by a pattern of modules' names
    alphas: dict[str, float]

    @classmethod
    def of(cls, settings: Fields) -> PeftConfig:
        """Raises Mistake, naming the key, on a value that `Lora` cannot have and on a key that nobody knows."""
        kind = settings.get("peft_type", str)
        if kind != "LORA":
            raise Mistake(f"{settings.where}: peft_type {brief(kind)!r} is not supported; only LORA is")
        _check_init(settings)
        ranks, alphas = settings.object("rank_pattern"), settings.object("alpha_pattern")
        plan = cls(
            settings.get("r", int),
            settings.get("lora_alpha", float),
            settings.get("use_rslora", bool, False),
            settings.get("use_dora", bool, False),
            _modules(settings, "target_modules"),
            _modules(settings, "exclude_modules"),
            {pattern: ranks.get(pattern, int) for pattern in ranks},
            {pattern: alphas.get(pattern, float) for pattern in alphas},
        )
        for name, value in {"r": plan.rank, **plan.ranks}.items():
            if value < 1:
                raise Mistake(f"{settings.where}: {brief(name)!r} is {value}; a rank is at least 1")
        if not plan.targets:
            raise Mistake(f"{settings.where}: 'target_modules' is absent; PEFT writes the names of the adapted modules")
        for key, patterns in (("rank_pattern", plan.ranks), ("alpha_pattern", plan.alphas)):
            for pattern in patterns:
                _check_pattern(settings, key, pattern)
        for name, value in settings.content.items():
            off = value in (None, False, [], *UNSUPPORTED.get(name, ({},)))
            if not off and name not in (*KEYS_READ, *HARMLESS_KEYS.split()):
                known = "is not supported" if name in UNSUPPORTED else "is not known here, and may change the function"
                raise Mistake(f"{settings.where}: {brief(name)}={brief(value)} {known}")
        return plan

    def targeted(self, module: str) -> bool:
        """True if PEFT adapts the module of this name."""
        return matches(self.targets, module) and not matches(self.excluded, module)

    def scale_of(self, path: Path, module: str, stored: int) -> float:
        """The scale of a module whose A has `stored` rows. Raises Mistake if the config gives it another rank."""
        rank = next((r for pattern, r in self.ranks.items() if _names_module(pattern, module)), self.rank)
        alpha = next((a for pattern, a in self.alphas.items() if _names_module(pattern, module)), self.alpha)
        if rank != stored:
            raise Mistake(f"{path}: {module} has rank {stored}; 'r' and 'rank_pattern' of {CONFIG} give it {rank}")
        return alpha / (rank**0.5 if self.rslora else rank)


KEYS_READ = (
    "peft_type",
    "init_lora_weights",
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "target_modules",
    "exclude_modules",
    "rank_pattern",
    "alpha_pattern",
)


def _check_init(settings: Fields) -> None:
    init = settings.content.get("init_lora_weights")
    if not (init is None or isinstance(init, bool) or (isinstance(init, str) and init.lower() in HARMLESS_INITS)):
        raise Mistake(
            f"{settings.where}: init_lora_weights={brief(init)!r} is not supported: such an adapter belongs to a base "
            "from which its first values were taken out. In PEFT, save it with "
            "path_initial_model_for_weight_conversion, which makes it an adapter of the base itself"
        )


def _modules(settings: Fields, key: str) -> str | list[str]:
    """Names of modules, or one regular expression. Raises Mistake if it is neither."""
    value = settings.content.get(key)
    if isinstance(value, str):
        _check_pattern(settings, key, value)
        return value
    return settings.texts(key)


def _check_pattern(settings: Fields, key: str, pattern: str) -> None:
    """Raises Mistake on what is no regular expression, or one that could go on for ever."""
    repeats = len(re.findall(r"[*+{]|(?<![(*+?}])\?", pattern))  # `(?` and the `?` behind another repeat are none
    if repeats > MOST_REPEATS or re.search(r"\)[*+{]", pattern):
        raise Mistake(
            f"{settings.where}: {key!r}: the pattern {brief(pattern)!r} repeats groups, or more than "
            f"{MOST_REPEATS} characters; list the modules' names instead"
        )
    try:
        re.compile(pattern)
    except re.error as error:
        raise Mistake(f"{settings.where}: {key!r}: {brief(pattern)!r} is not a regular expression: {error}") from None


def matches(names: str | list[str], module: str) -> bool:
    if isinstance(names, str):
        return names == "all-linear" or re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _names_module(pattern: str, module: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", module) is not None
