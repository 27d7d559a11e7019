"""The combinations of settings in which one has no effect: a table, and the refusal of what was set to none."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxalign.mistake import Mistake
from jaxalign.outside import brief


class Row(NamedTuple):
    """Settings that have an effect only where one of the others has a fitting value."""

    names: tuple[str, ...]
    others: dict[str, Callable[[Any], bool]]  # dotted name -> whether its value fits
    of: str = ""  # only commands that have this setting


def _absent(value: Any) -> bool:
    return value is None


def _several(value: int) -> bool:
    return value > 1


def _cuts(share: float) -> bool:
    return share < 1


_MESH = ("mesh.data", "mesh.fsdp", "mesh.tensor")
EFFECTS = (
    Row(("lora.alpha", "lora.targets", "lora.rslora", "lora.dora", "lora.quantise"), {"lora.rank": bool}),
    Row(("epochs",), {"steps": _absent}),
    Row(("eval_share",), {"eval_data": _absent}),
    Row(("ref_update.alpha",), {"ref_update.every": bool}),
    Row(("combine",), {"members": _several}),
    Row(("engine_kind", "engine_reload"), {"engine": bool}),
    Row(("decode_layout",), {"engine": _absent}),
    Row(("cache_dtype", "precision", *_MESH), {"engine": _absent}, of="prompts"),
    Row(("eval_every",), {"samples": bool}, of="slots"),
    Row(("algorithm.kl_estimator", "algorithm.kl_in"), {"algorithm.kl_coef": bool}),
    Row(("algorithm.importance_cap",), {"top_p": _cuts, "top_k": bool, "min_p": bool, "engine": bool}),
    Row(("algorithm.halt_kl",), {"algorithm.epochs": _several, "algorithm.minibatches": _several}),
    Row(("algorithm.value_clip_epsilon", "critic.learning_rate"), {"algorithm.value_coef": bool}),
    Row(("top_p", "top_k", "min_p", "seed"), {"temperature": bool}, of="repetition_penalty"),
    Row(("reward_seconds", "keep"), {"reward": bool}, of="keep"),
    Row(("keep",), {"n": _several}),
)


def check(config: Any) -> None:
    """Raises Mistake on a setting that differs from its default where it has no effect."""
    for name, row in without_effect(config).items():
        others = {other: value for other in row.others if (value := _value(config, other, ...)) is not ...}
        shown = " and ".join(_shown(other, value) for other, value in others.items())
        raise Mistake(
            f"`{name}` {brief(repr(_value(config, name)))} has no effect {shown}; leave it out, or change "
            f"{' or '.join(f'`{other}`' for other in others)}",
            setting=name,
        )


def _shown(name: str, value: Any) -> str:
    if value is None or value is False:
        return f"without `{name}`"
    return f"with `{name}`" if isinstance(value, str) else f"with `{name}` {value}"  # an address may hold a password


def without_effect(config: Any) -> dict[str, Row]:
    """The settings that differ from their defaults and change nothing, by dotted name, with their rows."""
    result = {}
    for row in EFFECTS:
        fits = [fit(value) for other, fit in row.others.items() if (value := _value(config, other, ...)) is not ...]
        if not fits or any(fits) or (row.of and not hasattr(config, row.of)):
            continue
        for name in row.names:
            if _value(config, name, ...) not in (..., default_of(type(config), name)):
                result.setdefault(name, row)
    return result


def effective(config: Any, *, of: Any = None) -> Any:
    """The config with the settings that have no effect at their defaults.

    Args:
      config: a command's settings.
      of: only those settings whose values are this config's; by default all.
    """
    for name in without_effect(config):
        if of is None or _value(config, name) == _value(of, name):
            group, dot, inner = name.partition(".")
            value = default_of(type(config), name)
            changed = dataclasses.replace(getattr(config, group), **{inner: value}) if dot else value
            config = dataclasses.replace(config, **{group: changed})
    return config


def default_of(kind: type, name: str) -> Any:
    """The default of a setting by its dotted name; `...` where it has none, or there is no such setting."""
    group, _, inner = name.partition(".")
    field = next((field for field in dataclasses.fields(kind) if field.name == group), None)
    if field is None:
        return ...
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
        return _value(value, inner, ...) if inner else value
    return ... if field.default is dataclasses.MISSING else field.default


def _value(config: Any, name: str, *absent: Any) -> Any:
    return functools.reduce(lambda part, inner: getattr(part, inner, *absent), name.split("."), config)
