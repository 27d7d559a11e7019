"""Which values a config may have, and a config as JSON and back. Standard library only, as the configs themselves."""

from __future__ import annotations

import dataclasses
import json
import math
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

# What a number may be, by its field's name in any config: (least, most, whether `most` itself is too much).
LIMITS: dict[str, tuple[float, float, bool]] = {
    "batch_size": (1, math.inf, True),
    "microbatches": (1, math.inf, True),
    "members": (1, math.inf, True),
    "steps": (1, math.inf, True),
    "max_length": (2, math.inf, True),  # the first token is never learned
    "eval_share": (0, 1, True),
    "max_dropped": (0, 1, False),
    "eval_every": (0, math.inf, True),
    "samples": (0, math.inf, True),
    "seed": (0, 2**32, True),
    "rank": (0, math.inf, True),
    "learning_rate": (0, math.inf, True),
    "warmup_steps": (0, math.inf, True),
    "weight_decay": (0, math.inf, True),
    "max_grad_norm": (0, math.inf, True),
    "b1": (0, 1, True),
    "b2": (0, 1, True),
    "every": (0, math.inf, True),
    "keep": (1, math.inf, True),
    "keep_best": (0, math.inf, True),
    "max_new_tokens": (1, math.inf, True),
    "temperature": (0, math.inf, True),
    "top_k": (0, math.inf, True),
    "min_p": (0, 1, True),
    "n": (1, math.inf, True),
    "slots": (1, math.inf, True),
    "minibatches": (1, math.inf, True),
    "gamma": (0, 1, False),
    "gae_lambda": (0, 1, False),
    "kl_coef": (0, math.inf, True),
    "value_coef": (0, math.inf, True),
    "entropy_coef": (0, math.inf, True),
    "pretraining_coef": (0, math.inf, True),
    "missing_end_penalty": (0, math.inf, True),
    "dynamic_sampling": (0, math.inf, True),
}
# What is above 0, and at most so much.
POSITIVE = {
    "epochs": math.inf,
    "alpha": math.inf,
    "top_p": 1.0,
    "importance_cap": math.inf,
    "reward_clip": math.inf,
    "repetition_penalty": math.inf,
    "reward_seconds": math.inf,
    "kl_target": math.inf,
    "kl_budget": math.inf,
    "clip_scores": math.inf,
    "halt_kl": math.inf,
    "value_clip_epsilon": math.inf,
}


def check(config: Any, *, prefix: str = "--") -> None:
    """Raises ValueError, naming the flag, on a number that is outside of LIMITS or POSITIVE, or on an empty text."""
    for f in dataclasses.fields(config):
        value, flag = getattr(config, f.name), prefix + f.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            check(value, prefix=flag + ".")
        elif value is None:
            continue
        elif f.name in LIMITS and not isinstance(value, str):
            least, most, open_end = LIMITS[f.name]
            if not least <= value <= most or (open_end and value == most):
                below = "" if most == math.inf else f" and {'below' if open_end else 'at most'} {most}"
                raise ValueError(f"{flag} {value}: it must be at least {least}{below}")
        elif f.name in POSITIVE:
            if not 0 < value <= POSITIVE[f.name] or value == math.inf:
                most = "" if POSITIVE[f.name] == math.inf else f" and at most {POSITIVE[f.name]:g}"
                raise ValueError(f"{flag} {value}: it must be above 0{most}")
        elif f.name != "prompts" and "" in (value if isinstance(value, tuple) else (value,)):
            raise ValueError(f"{flag} is empty; give it a value, or leave the flag out")


def to_json(config: Any) -> dict[str, Any]:
    """The config as plain JSON values; `from_json` is its inverse."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def from_json(kind: type, values: dict[str, Any], *, where: str = "config.json") -> Any:
    """A config of `kind` from `to_json`'s values. Raises ValueError on a name that `kind` does not have."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ValueError(f"{where}: {kind.__name__} has no field {', '.join(unknown)}; it has {', '.join(fields)}")
    absent = [n for n, f in fields.items() if n not in values and f.default is f.default_factory is dataclasses.MISSING]
    if absent:
        raise ValueError(f"{where} has no {', '.join(absent)}, which {kind.__name__} needs")
    hints, known = get_type_hints(kind), {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]) and isinstance(value, dict):
            known[name] = from_json(hints[name], value, where=f"{where}: {name}")
            continue
        if not _fits(value, hints[name]):
            raise ValueError(f"{where}: {name} is {value!r}, and must be {fields[name].type}")
        known[name] = Path(value) if hints[name] in (Path, Path | None) and value is not None else value
    return kind(**known)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is one of the field's type."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, {Path: str, float: (int, float)}.get(hint, hint))
