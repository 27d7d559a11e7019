"""A first look at the files that settings name, before the imports of a command, which take seconds.

The command itself looks again, and more closely.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from jaxalign.data.read import sources
from jaxalign.mistake import Mistake, about
from jaxalign.outside import brief, check_local
from jaxalign.run.folder import open_run, read_run
from jaxalign.select import select, terms

DATA = ("data", "eval_data", "pretraining_data")
MODELS = ("model", "tokenizer", "ref_model", "critic.model")


def look(config: Any, command: str, *, trains: bool) -> None:
    """Raises Mistake on a file or folder that is not there, and on an `output` that holds something else.

    Hub names are not looked up. Hosts that start together leave `output` to the first of them, later.
    """
    for name in DATA:
        if (spec := _value(config, name)) is not None:
            with about(name):
                for source in sources.parse(spec):
                    _check_home(source.name)
                    sources.check_exists(source)
    for name in MODELS:
        if (source := _value(config, name)) is not None and _is_local(source):
            from jaxalign.models.files import huggingface

            with about(name):
                _check_home(source)
                huggingface.folder(source)
    prompts = _value(config, "prompts")
    if prompts and not re.search(r"\s", prompts):  # else it is a prompt itself
        check_local(prompts, "prompts")
    for source in _reward_models(reward) if (reward := _value(config, "reward")) else ():
        with about("reward"):
            check_local(source)
    adapter = _value(config, "adapter")
    if isinstance(adapter, Path) and not adapter.is_dir():
        raise Mistake(f"`adapter` {adapter}: no such folder")
    if command == "export":
        read_run(config.run)
    if trains and not config.distributed:
        open_run(config, command=command, resume=config.resume, write=False)


def _check_home(name: str) -> None:
    if os.path.expanduser(name).startswith("~"):
        raise Mistake(f"{brief(name)}: there is no such user, or it has no home; write the path in full")


def _value(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part, None)
    return config


def _reward_models(text: str) -> list[str]:
    """Folders of the reward models that a text for `reward` names."""
    calls = [term for _, term in terms(text) if term.partition("(")[0].strip() == "reward_model"]
    functions = [select(call, {"reward_model": lambda **_: None}) for call in calls]
    return [str(getattr(function, "keywords", {}).get("path", "")) for function in functions]


def _is_local(source: str) -> bool:
    """True for a name that no hub is asked for."""
    return source.startswith(("config:", ".", "/", "~")) or source.count("/") > 1 or Path(source).exists()
