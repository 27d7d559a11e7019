"""The run folder: which run it holds, and whether a command may continue it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import re
from pathlib import Path
from typing import Any

import jaxalign
from jaxalign.config.effects import effective
from jaxalign.config.limits import from_json, to_json
from jaxalign.mistake import Mistake
from jaxalign.outside import brief, read_object, read_text
from jaxalign.run import lock

# A continued run may differ in these settings, or groups of them. The first line changes how long it runs and what it
# shows; the second who generates; the third where and in which order the same numbers are added up, so that results
# differ by roundings at most.
FREE = frozenset(
    {"output", "resume", "profile", "check_kernels", "checkpoint", "log", "samples", "distributed", "steps", "epochs"}
    | {"fingerprints"}
    | {"optimizer.extend", "eval_every", "max_dropped", "algorithm.reference"}
    | {"engine", "engine_kind", "engine_reload", "reward_seconds", "slots", "decode_layout"}
    | {"microbatches", "mesh", "remat", "attention", "implementation", "offload_reference", "precompute_reference"}
    | {"share_prompt"}
)
LEARNING_RATE = "optimizer.learning_rate"
# Besides config.json, what a run writes into its folder. Other files there, such as a log, are the user's own.
WRITTEN = ("adapter", "checkpoints", "final", "metrics.jsonl", "policy", "reference", "samples.jsonl", "tensorboard")
MARK, MARK_FILE = "trained_steps", "jaxalign.json"  # of an exported folder
GIT_LIMIT = 4096  # bytes of a file of git that names a commit
PACKAGES = "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "datasets", "safetensors"


def open_run(config: Any, *, command: str, resume: bool, write: bool, weights: dict[str, str] | None = None) -> bool:
    """Makes `config.output` hold this run. True if it already held it, so that there may be something to continue.

    Of several hosts, the first alone calls it.

    Args:
      command: the name under which the config runs.
      resume: whether a folder with a run in it may be continued.
      write: make the folder; else only look.
      weights: fingerprints of the models that the run reads, by their setting and source; None: not compared.

    Raises:
      Mistake: another process trains there; or the folder holds another run, one that began with other weights, or
        parts of one without its config; or resuming was refused, or it is none.
    """
    folder = Path(config.output)
    path = folder / "config.json"
    if folder.exists() and not folder.is_dir():
        raise Mistake(f"`output` {folder} is a file; name a folder")
    lock.refuse_if_held(folder)
    if path.exists():
        _check_same(config, command, path, resume)
        check_weights(path, weights or {})
        return True
    if remains := sorted(name for name in WRITTEN if (folder / name).exists()):
        raise Mistake(
            f"`output` {folder} holds {', '.join(remains)} of a run, and no config.json that describes it; name a new "
            "folder"
        )
    check_writable(folder)
    if write:
        partial = path.with_suffix(".partial")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(describe(config, command, weights), indent=2) + "\n")
            os.replace(partial, path)
        except OSError as error:
            raise Mistake(f"`output` {folder} cannot be written ({error.strerror}); name another folder") from None
    return False


def check_writable(path: Path) -> None:
    """Raises Mistake unless `path` can be made: the nearest part of it that exists is a folder open to us."""
    path = path.absolute()
    nearest = next(p for p in (path, *path.parents) if p.exists())
    if not nearest.is_dir():
        raise Mistake(f"`output` {path}: {nearest} is a file, so nothing can be made in it; name another place")
    if not os.access(nearest, os.W_OK):
        raise Mistake(f"`output` {path}: {nearest} is read-only for this user; name another place")


def _check_same(config: Any, command: str, path: Path, resume: bool) -> None:
    described = read_run(path.parent)
    if not resume:
        raise Mistake(f"`output` {path.parent} holds a run already and `resume` is off; name another folder")
    if described["command"] != command:
        raise Mistake(f"`output` {path.parent} holds a run of `{described['command']}`, not of `{command}`")
    before = from_json(type(config), described["config"], where=str(path))
    free = {name: getattr(config, name) for name in FREE if hasattr(config, name)}
    then = _by_name(to_json(effective(dataclasses.replace(before, **free))))
    changed = [
        f"{name} was {brief(repr(then.get(name)))}, now {brief(repr(value))}"
        for name, value in _by_name(to_json(effective(config))).items()
        if then.get(name) != value and not FREE & {name, name.partition(".")[0]}
        if (name, value) != (LEARNING_RATE, None)  # that of the run
    ]
    if changed:
        raise Mistake(
            f"`output` {path.parent} holds another run: {'; '.join(changed)}. Name another folder, or repeat its "
            f"settings with `from_config` {path}"
        )


def check_weights(path: Path, weights: dict[str, str]) -> None:
    """Raises Mistake where a model is another than the run began with. Runs of older versions did not record them."""
    recorded = read_object(path).object("weights")
    for source, fingerprint in weights.items():
        if recorded.get(source, str, None) not in (None, fingerprint):
            raise Mistake(
                f"the weights or config of {source} have changed since {path.parent} was started, so it can neither go "
                "on nor be exported with them; restore them, or start anew with another `output`",
                setting="output",
            )


def _by_name(values: dict[str, Any]) -> dict[str, Any]:
    """Settings by their dotted names."""
    result = {}
    for name, value in values.items():
        group = value if isinstance(value, dict) else None
        result |= {name: value} if group is None else {f"{name}.{inner}": x for inner, x in group.items()}
    return result


def learning_rate_of(folder: Path) -> float | None:
    """The peak learning rate of the run that a folder holds; None where its config.json has no number for it."""
    value = _by_name(read_run(folder)["config"]).get(LEARNING_RATE)
    return value if isinstance(value, int | float) else None


def read_run(folder: Path) -> dict[str, Any]:
    """The contents of config.json. Raises Mistake when `folder` is not a run folder, or the file is damaged."""
    path = Path(folder) / "config.json"
    if not path.exists():
        raise Mistake(f"{folder} is not a run folder: it has no config.json of a run")
    described = read_object(path)
    if not {"command", "config"} <= set(described):
        raise Mistake(f"{path} does not describe a run of jaxalign (it has no 'command' and 'config')")
    return described.content | {"command": described.get("command", str), "config": described.get("config", dict)}


def is_finished(output: Path, steps: int) -> bool:
    """True if `final/` holds the model after that many steps."""
    return trained_steps(Path(output) / "final") == steps


def trained_steps(folder: Path) -> int | None:
    """The steps that an exported folder says it was trained for; None where it says nothing."""
    try:
        return read_object(folder / MARK_FILE).get(MARK, int)
    except Mistake:
        return None


def mark(step: int) -> dict[str, Any]:
    """The contents of MARK_FILE."""
    return {MARK: step, "jaxalign": jaxalign.__version__}


def describe(config: Any, command: str, weights: dict[str, str] | None = None) -> dict[str, Any]:
    """The config with what it ran on: weights, versions, the working folder and its git commit."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "command": command,
        "config": to_json(config),
        "jaxalign": jaxalign.__version__,
        "weights": weights or {},
        "folder": os.getcwd(),
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "versions": versions,
    }


def git_commit() -> str | None:
    """The commit of the working folder, read from the files of git; None where there is none.

    git itself obeys the configuration of a repository, which can name programs to run, so it is not called in a folder
    that may be somebody else's.
    """
    here = Path.cwd()
    try:
        git = next(folder / ".git" for folder in (here, *here.parents) if (folder / ".git").exists())
        if git.is_file():  # of a worktree or a submodule
            git = git.parent / read_text(git, limit=GIT_LIMIT).removeprefix("gitdir:").strip()
        head = read_text(git / "HEAD", limit=GIT_LIMIT).strip()
        name = head.removeprefix("ref:").strip()
        shared = git / read_text(git / "commondir", limit=GIT_LIMIT).strip() if (git / "commondir").exists() else git
        places = [place / name for place in (git, shared) if name != head and (place / name).is_file()]
        if places:
            head = read_text(places[0], limit=GIT_LIMIT).strip()
        elif name != head and (shared / "packed-refs").exists():
            lines = (line.split() for line in read_text(shared / "packed-refs").splitlines())
            head = next(words[0] for words in lines if words[1:] == [name])
    except (StopIteration, OSError, ValueError):
        return None
    return head if re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", head) else None
