"""`jaxalign <command> --flags`: tyro over the dataclasses of `runs/config.py`, and nothing else.

What is heavy is imported when a command runs. A mistake of the user is one line on stderr and exit status 2;
`JAXALIGN_TRACEBACK=1` shows where it was raised.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from jaxalign.runs import config

# command -> (its config, the function that runs it)
COMMANDS: dict[str, tuple[type, str]] = {
    "sft": (config.SFTConfig, "jaxalign.runs.sft:run"),
    "generate": (config.GenerateConfig, "jaxalign.runs.generate:run"),
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
    """The command's name and its config. Exits with tyro's message on an unknown flag or a value of the wrong type."""
    import tyro

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
    return command, tyro.cli(kind, args=rest, default=default, prog=f"jaxalign {command}")


def _from_config(kind: type, arguments: list[str]) -> tuple[Any, list[str]]:
    """`--from-config FILE` gives the values that the other flags then override."""
    if "--from-config" not in arguments:
        return None, arguments
    at = arguments.index("--from-config")
    if at + 1 == len(arguments):
        raise ValueError("--from-config needs a file: the config.json of a run folder")
    path = Path(arguments[at + 1])
    try:
        values = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    return config.from_json(kind, values.get("config", values), where=str(path)), arguments[:at] + arguments[at + 2 :]


def _overview() -> str:
    lines = ["usage: jaxalign COMMAND [--help] [flags]", "", "commands:"]
    lines += [f"  {name:<12}{(kind.__doc__ or '').splitlines()[0]}" for name, (kind, _) in COMMANDS.items()]
    lines += ["", "jaxalign COMMAND --help tells the flags; --from-config RUN/config.json repeats a run."]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
