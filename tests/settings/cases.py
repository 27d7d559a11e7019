"""Settings of the runs that are compared, their other values, and what finds a setting that changes nothing."""

import dataclasses
import functools
from typing import Any, Literal, get_args, get_origin

from jaxalign.commands import COMMANDS
from jaxalign.config.limits import settings
from tests.observed import difference

TRAINING = [name for name, command in COMMANDS.items() if command.trains]
OFFLINE = ("sft", "dpo", "kto", "reward")

# Settings of the runs that are compared; a name in braces is a file of the fixture `files`.
EVERYWHERE = {
    "model": "{model}",
    "output": "{output}",
    "steps": 2,
    "batch_size": 16,
    "max_length": 32,
    "max_dropped": 0.5,
    "remat": "none",
}
ON_POLICY = {"data": "{prompts}", "batch_size": 8, "n": 4, "max_new_tokens": 8, "reward": "tests.commands.rewards:dogs"}
BASES = {
    "sft": {"data": "{rows}"},
    "dpo": {"data": "{pairs}"},
    "kto": {"data": "{rated}"},
    "reward": {"data": "{pairs}"},
    **dict.fromkeys(("ppo", "grpo", "rloo", "online-dpo"), ON_POLICY),
}

# Other values, where "the next one" (`another`) would not do; and the settings without which one has nothing to do.
VALUES: dict[str, Any] = {
    "model": "{other_model}",
    "output": "{other_output}",
    "tokenizer": "{other_words}",
    "chat_template": "{other_template}",
    "epochs": 2.0,
    "batch_size": 32,
    "microbatches": 2,
    "max_length": 40,
    "max_dropped": 0.0,
    "precision": "bfloat16",
    "export_dtype": "bfloat16",
    "attention": "cudnn",
    "implementation": "pallas",
    "eval_data": "{other_rows}",
    "ref_model": "{other_model}",
    "log.wandb": "project",
    "optimizer.learning_rate": 1e-3,
    "lora.rank": 2,
    "lora.alpha": 8.0,
    "lora.targets": "q_proj",
    "mesh.data": 2,
    "mesh.fsdp": 4,
    "mesh.tensor": 2,
    "max_new_tokens": 3,
    "samples": 1,
    "slots": 8,
    "decode_layout": "training",
    "reward": "tests.commands.rewards:names_dog",
    "reward_seconds": 0.02,
    "reward_clip": 0.5,
    "engine": "http://localhost:1",
    "engine_reload": '/load {"path": "{folder}"}',
    "kl_budget": 1.0,
    "temperature": 0.7,
    "min_p": 0.1,
    "top_p": 0.9,
    "combine": "min",
    "step_separator": "?",
    "pretraining_data": "{rows}",
    "critic.model": "{other_model}",
    "critic.learning_rate": 1e-3,
    "algorithm.kl_target": 3.0,
    "algorithm.clip_scores": 0.1,
    "algorithm.halt_kl": 0.1,
    "algorithm.kl_in": "loss",
    "last_turn": "continue",
}
LOSSES = {
    "sft": "dft",
    "dpo": "ipo",
    "kto": "bco",
    "reward": "bradley_terry(margin=0.5)",
    "ppo": "reinforce",
    "grpo": "reinforce",
    "rloo": "ppo_clip",
    "online-dpo": "ipo",
}
CHAT = {"chat_template": "{template}"}
LORA = {"lora.rank": 4}
SERVER = {"engine": "http://localhost:1"}
CONTEXTS: dict[str, dict[str, Any]] = {
    "epochs": {"steps": None},
    "lora.alpha": LORA,
    "lora.targets": LORA,
    "lora.rslora": LORA,
    "lora.dora": LORA,
    "lora.quantise": LORA,
    "mesh.fsdp": {"mesh.data": -1, "mesh.fsdp": 8},
    "as_chat": CHAT,
    "turns": CHAT | {"data": "{talks}"},
    "long_text": {"data": "{texts}"},
    "last_turn": CHAT | {"data": "{talks}", "last_turn": "drop", "max_length": 48, "reward": "length(target=3)"},
    "ref_update.alpha": {"ref_update.every": 1},
    "combine": {"members": 2},
    "step_separator": {"data": "{solutions}", "algorithm.loss": "process"},
    "reward_seconds": {"reward": "tests.commands.rewards:hangs(seconds=0.2)"},
    "engine_kind": SERVER,
    "engine_reload": SERVER,
    "pretraining_data": {"pretraining_data": "{texts}", "algorithm.pretraining_coef": 0.1},
    "algorithm.pretraining_coef": {"pretraining_data": "{texts}", "algorithm.pretraining_coef": 0.1},
    "algorithm.importance_cap": {"top_p": 0.9},
    "algorithm.kl_in": {"algorithm.kl_estimator": "k3"},
}
PER_COMMAND: dict[tuple[str, str], dict[str, Any]] = {
    ("sft", "chat_template"): CHAT | {"data": "{talks}"},
    **{(c, "chat_template"): CHAT | {"as_chat": True} for c in TRAINING if c != "sft"},
    **{(c, "algorithm.kl_estimator"): {"algorithm.kl_coef": 0.1} for c in ("grpo", "rloo")},
}


def another(hint: Any, value: Any) -> Any:
    """Another value of a setting's type."""
    plain = get_args(hint)[0] if hasattr(hint, "__metadata__") else hint
    if get_origin(plain) is Literal:
        return next(choice for choice in get_args(plain) if choice != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    assert isinstance(value, float), f"{value!r} of {hint}: give another value in VALUES"
    return value / 2 if value else 0.1


def config_of(kind: type, values: dict[str, Any], files: dict[str, str]) -> Any:
    """A config from dotted names; texts in braces become paths."""
    groups: dict[str, dict[str, Any]] = {}
    top: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, str) and value[:1] == "{" and value[1:-1] in files:
            value = files[value[1:-1]]
        group, dot, inner = name.partition(".")
        (groups.setdefault(group, {}) if dot else top)[inner if dot else group] = value
    config = kind(**top)
    return dataclasses.replace(config, **{g: dataclasses.replace(getattr(config, g), **v) for g, v in groups.items()})


def value_of(config: Any, name: str) -> Any:
    return functools.reduce(getattr, name.split("."), config)


def disobeyed(kind, values, files, run, *, contexts, others):
    """Settings that neither change what `run(config)` observes nor are refused, with the reason.

    Args:
      kind: the class of the settings.
      values: of the config, by dotted name.
      files: for names in braces.
      run: config -> Observation.
      contexts: name -> settings without which it has nothing to do.
      others: name -> another value.
    """
    seen, reasons = {}, []
    for name, hint in settings(kind).items():
        context = values | contexts.get(name, {})
        config, key = config_of(kind, context, files), repr(contexts.get(name))
        if key not in seen:
            seen[key] = run(config)
            assert seen[key].mistake is None, (name, seen[key].mistake)
        other = others[name] if name in others else another(hint, value_of(config, name))
        after = run(config_of(kind, context | {name: other}, files))
        if after.mistake is not None:
            if after.mistake.setting != name and f"`{name}`" not in str(after.mistake):
                reasons.append(f"{name}={other!r}: {after.mistake}")
        elif difference(seen[key], after) is None:
            reasons.append(f"{name}={other!r} changes nothing")
    return reasons
