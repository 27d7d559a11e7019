"""`jaxalign <command> --flags`: tyro over the config dataclasses of runs/, and nothing else.

What is heavy is imported when a command runs. A mistake of the user is one line on stderr and exit status 2;
`JAXALIGN_TRACEBACK=1` shows where it was raised.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

from jaxalign.runs import config, rl_config
from jaxalign.runs.values import from_json

# command -> (its config, the function that runs it)
COMMANDS: dict[str, tuple[type, str]] = {
    "sft": (config.SFTConfig, "jaxalign.runs.sft:run"),
    "dpo": (config.DPOConfig, "jaxalign.runs.preferences:run_dpo"),
    "kto": (config.KTOConfig, "jaxalign.runs.preferences:run_kto"),
    "reward": (config.RewardConfig, "jaxalign.runs.reward:run"),
    "ppo": (rl_config.PPOConfig, "jaxalign.runs.ppo:run"),
    "grpo": (rl_config.PolicyConfig, "jaxalign.runs.rl:run_grpo"),
    "rloo": (rl_config.RLOOConfig, "jaxalign.runs.rl:run_rloo"),
    "online-dpo": (rl_config.OnlineDPOConfig, "jaxalign.runs.online_dpo:run"),
    "generate": (config.GenerateConfig, "jaxalign.runs.generate:run"),
    "chat": (config.ChatConfig, "jaxalign.runs.chat:run"),
    "export": (config.ExportConfig, "jaxalign.runs.export:run"),
    "quickstart": (config.QuickstartConfig, "jaxalign.quickstart.pipeline:run"),
}


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        command, chosen = parse(arguments)
        module, _, function = COMMANDS[command][1].partition(":")
        return getattr(importlib.import_module(module), function)(chosen) or 0
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        sys.stderr.close()
        return 141
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("JAXALIGN_TRACEBACK"):
            raise
        print(f"jaxalign: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("jaxalign: interrupted", file=sys.stderr)
        return 130


def parse(arguments: list[str]) -> tuple[str, Any]:
    """The command's name and its config. Raises ValueError on an unknown flag or a value of the wrong type."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        raise SystemExit(0)
    if arguments[0] == "--version":
        import jaxalign

        print(jaxalign.__version__)
        raise SystemExit(0)
    command, *rest = arguments
    if command not in COMMANDS:
        raise ValueError(f"unknown command {command!r}; there are {', '.join(COMMANDS)}")
    kind, _ = COMMANDS[command]
    default, rest = _from_config(kind, rest)
    return command, _flags(kind, rest, default, f"jaxalign {command}")


def _flags(kind: type, arguments: list[str], default: Any, program: str) -> Any:
    """tyro's reading of the flags, with its box of what is wrong as one line."""
    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, args=arguments, default=default, prog=program)
    except SystemExit as end:
        if end.code in (0, None):  # --help
            raise
        raise ValueError(f"{_one_line(said.getvalue())}; see {program} --help") from None


def _one_line(box: str) -> str:
    """What a box of tyro says, or its plain form where the terminal has no lines to draw with.

    The help of fields, which stands further in, is left out: `--help` has it.
    """
    sections: list[list[str]] = [[]]
    for line in (line.strip("│").rstrip() for line in box.splitlines()[1:] if not line.startswith("╰")):
        if line and not line.strip(" ─-"):
            sections.append([])
        elif not line.startswith(" " * 8):
            sections[-1] += line.split()
    said = [" ".join(words).rstrip(".") for words in sections if words]
    return "; ".join(text for text in said if not text.startswith(("For full helptext", "Argument helptext")))


def _from_config(kind: type, arguments: list[str]) -> tuple[Any, list[str]]:
    """`--from-config FILE` gives the values that the other flags then override."""
    arguments = [part for a in arguments for part in (a.split("=", 1) if a.startswith("--from-config=") else [a])]
    if "--from-config" not in arguments:
        return None, arguments
    at = arguments.index("--from-config")
    if at + 1 == len(arguments):
        raise ValueError("--from-config needs a file: the config.json of a run folder")
    path, rest = Path(arguments[at + 1]), arguments[:at] + arguments[at + 2 :]
    path = path / "config.json" if path.is_dir() else path
    try:
        held = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"--from-config {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"--from-config {path} is damaged: {error}") from None
    values = held.get("config", held) if isinstance(held, dict) else None
    if not isinstance(values, dict):
        raise ValueError(f"--from-config {path} is no config: it holds no names and values")
    names = [name for name, (known, _) in COMMANDS.items() if known is kind]
    if held.get("command", names[0]) not in names:
        raise ValueError(f"--from-config {path} is of `jaxalign {held['command']}`, not of `jaxalign {names[0]}`")
    return from_json(kind, values, where=str(path)), rest


def _overview() -> str:
    lines = ["usage: jaxalign COMMAND [--help] [flags]", "", "commands:"]
    lines += [f"  {name:<12}{(kind.__doc__ or '').splitlines()[0]}" for name, (kind, _) in COMMANDS.items()]
    lines += ["", "jaxalign COMMAND --help tells the flags; --from-config RUN/config.json repeats a run."]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
