"""`jaxalign COMMAND --flags`: tyro over the table of commands, and nothing else.

Heavy libraries are imported when a command runs. A user's mistake is one line on stderr and exit status 2, with its
settings spelled as flags; `JAXALIGN_TRACEBACK=1` shows where it was raised. Any other error is a defect of ours, or of
a library under us: its traceback is shown, with a line that asks for a report.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from jaxalign.cli.early import look
from jaxalign.commands import COMMANDS
from jaxalign.config import limits
from jaxalign.config.effects import effective
from jaxalign.mistake import Mistake, about, spelled
from jaxalign.outside import brief, check_local, read_object, visible
from jaxalign.select import names_own_code, nearest

# types of settings: how the help writes them, and how an error does
KINDS = {int: ("INT", "a whole number"), float: ("FLOAT", "a number"), str: ("STR", "a text"), Path: ("PATH", "a path")}
NUMBERS: dict[Any, Any] = {float: (int, float)}
LONGEST = 4000  # characters of an error
REPORT = "this is a defect of jaxalign, or of a library under it: please report it, with the traceback above"


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    status = _status_of(sys.argv[1:] if arguments is None else arguments)
    joined = sys.modules.get("jaxalign.hosts")  # a heavy module, which a command that may join others has loaded
    return status if joined is None else joined.leave(status)


def _status_of(arguments: list[str]) -> int:
    """Runs a command and prints its error; the exit status."""
    try:
        command, config = parse(arguments)
        limits.check(config)
        look(config, command, trains=COMMANDS[command].trains)  # before the imports, which take seconds
        with _ends_noticed():
            return COMMANDS[command].load()(config) or 0
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        sys.stderr.close()
        return 141
    except Mistake as mistake:
        return _refused(spelled(str(mistake), _spelling(arguments)))
    except KeyboardInterrupt:
        _print("jaxalign: interrupted")
        return 130
    except OSError as error:
        if error.strerror is None:  # raised by a library, not by the operating system
            return _failed()
        return _refused(f"{error.filename or 'the operating system'}: {error.strerror}")
    except Exception:
        return _failed()


def parse(arguments: list[str]) -> tuple[str, Any]:
    """The command's name and its config. Raises Mistake on an unknown flag or a value of the wrong type."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        raise SystemExit(0)
    if arguments[0] == "--version":
        import jaxalign

        print(jaxalign.__version__)
        raise SystemExit(0)
    command, *rest = arguments
    if command not in COMMANDS:
        raise Mistake(f"unknown command {command!r}{nearest(command, list(COMMANDS))}; there are {', '.join(COMMANDS)}")
    kind = COMMANDS[command].config
    default, rest = _from_config(command, rest)
    rest = _renamed(kind, rest)
    if default is not None:
        _check_no_code(default, rest)
    config = _parsed_flags(kind, rest, default, f"jaxalign {command}")
    return command, config if default is None else effective(config, of=default)


@contextlib.contextmanager
def _ends_noticed() -> Iterator[None]:
    """Keeps losses and other code of a user's from ending an unfinished command with status 0, or without a word."""
    process, end = os.getpid(), os._exit

    def noticed(status: int) -> None:
        if os.getpid() == process:  # a child that was forked may end as it likes
            _print(f"jaxalign: error: code that the command ran called os._exit({status})")
            status = status or 1
        end(status)

    os._exit = noticed
    try:
        yield
    except SystemExit as error:
        raise Mistake(f"code that the command ran called sys.exit({error.code!r})") from error
    finally:
        os._exit = end


def _refused(text: str) -> int:
    """Prints a user's mistake, with its traceback if asked; the exit status."""
    if os.environ.get("JAXALIGN_TRACEBACK"):
        _print(traceback.format_exc())
    _print(f"jaxalign: error: {brief(text, LONGEST)}")
    return 2


def _failed() -> int:
    """Prints the traceback of a defect; the exit status."""
    _print(f"{traceback.format_exc()}jaxalign: {REPORT}")
    return 1


def _print(text: str) -> None:
    """Prints to stderr what a terminal only shows. A disk that is full, or a reader that has left, gets nothing."""
    with contextlib.suppress(OSError):
        print(visible(text, sys.stderr.encoding), file=sys.stderr, flush=True)


def _spelling(arguments: list[str]) -> Callable[[str], str | None]:
    """How settings are written: flags of the command that runs, words for all others."""
    command = COMMANDS.get(arguments[0]) if arguments else None
    known = {"from_config", *(limits.settings(command.config) if command else ())}
    return lambda name: f"--{name.replace('_', '-')}" if name in known else None


def _renamed(kind: type, arguments: list[str]) -> list[str]:
    """The arguments with flags of older versions under their present names; a line on stderr says so.

    Raises Mistake on a flag that an older version accepted, though the command never obeyed it.
    """
    flags = {f"--{old}": f"--{new}" for old, new in getattr(kind, "renamed", {}).items()}
    retired = {f"--{name.replace('_', '-')}" for name in getattr(kind, "retired", ())}
    result = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name.replace("--no-", "--") in retired:
            raise Mistake(f"{name} is no flag of this command, on which it never had an effect; leave it out")
        if name in flags:
            _print(f"jaxalign: {name} is now {flags[name]}")
            argument = flags[name] + equals + value
        result.append(argument)
    return result


def _parsed_flags(kind: type, arguments: list[str], default: Any, program: str) -> Any:
    """tyro's reading of the flags, with its box of errors as one line."""
    import tyro

    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box), _plain_types():
            return tyro.cli(kind, args=arguments, default=default, prog=program, description=_description(kind))
    except SystemExit as end:
        if end.code in (0, None):  # --help
            raise
        raise Mistake(f"{_one_line(box.getvalue())}; see {program} --help") from None


def _description(kind: type) -> str:
    return f"{kind.__doc__} --from-config FILE takes the settings of a run's config.json; other flags override them."


def _plain_types() -> Any:
    """tyro's rules for numbers and texts that may be absent: INT in the help, `none` as a value, errors in words."""
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec

    registry = ConstructorRegistry()

    @registry.primitive_rule
    def plain(info: Any) -> Any:
        options = [a for a in get_args(info.type) if a is not type(None)]
        optional = get_origin(info.type) in (Union, types.UnionType) and len(options) == 1
        kind = options[0] if optional else info.type
        if kind not in KINDS:
            return None
        metavar, words = KINDS[kind]

        def shown(value: Any) -> str:
            return visible(str(value)).replace("\n", "\\n")  # a default may be of somebody's file

        def read(texts: list[str]) -> Any:
            if optional and texts[0].lower() == "none":
                return None
            try:
                if kind is Path and not texts[0]:
                    raise ValueError  # Path("") is the working folder
                return kind(texts[0])
            except ValueError:
                raise ValueError(f"{texts[0]!r} is not {words}") from None

        return PrimitiveConstructorSpec(
            nargs=1,
            metavar=metavar,
            instance_from_str=read,
            is_instance=lambda value: (optional and value is None) or isinstance(value, NUMBERS.get(kind, kind)),
            str_from_instance=lambda value: ["none" if value is None else shown(value)],
        )

    return registry


def _one_line(box: str) -> str:
    """The text of a box of tyro, or of its plain form where the terminal has no lines to draw with.

    The help of fields, which is indented further, is left out: `--help` has it.
    """
    sections: list[list[str]] = [[]]
    for line in (line.strip("│").rstrip() for line in box.splitlines()[1:] if not line.startswith("╰")):
        if line and not line.strip(" ─-"):
            sections.append([])
        elif not line.startswith(" " * 8):
            sections[-1] += line.split()
    texts = [" ".join(words).rstrip(".").removeprefix("Error parsing ") for words in sections if words]
    return "; ".join(text for text in texts if not text.startswith(("For full helptext", "Argument helptext")))


def _from_config(command: str, arguments: list[str]) -> tuple[Any, list[str]]:
    """(the config that `--from-config FILE` holds, the other arguments, whose values override it)"""
    arguments = [part for a in arguments for part in (a.split("=", 1) if a.startswith("--from-config=") else [a])]
    if "--from-config" not in arguments:
        return None, arguments
    at = arguments.index("--from-config")
    if at + 1 == len(arguments):
        raise Mistake("`from_config` needs a file: the config.json of a run folder")
    check_local(arguments[at + 1], "from_config")
    path, rest = Path(arguments[at + 1]), arguments[:at] + arguments[at + 2 :]
    path = path / "config.json" if path.is_dir() else path
    with about("from_config"):
        described = read_object(path)
        values = described.get("config", dict, described.content)
        of = described.get("command", str, command)
        if of != command:
            raise Mistake(f"{path} is of jaxalign {brief(of)}, not of jaxalign {command}")
        return limits.from_json(COMMANDS[command].config, values, where=str(path)), rest


def _check_no_code(default: Any, arguments: list[str]) -> None:
    """Raises Mistake where a file names code of a user's own, which runs, and the command line does not name it too."""
    flags = {argument.partition("=")[0] for argument in arguments}
    for name, text in limits.functions(default).items():
        if names_own_code(text) and f"--{name}" not in flags:
            raise Mistake(
                f"`from_config` names code of its own for `{name}`: {brief(text)}. A file never makes code run; if you "
                f"trust this, give `{name}` on the command line as well"
            )


def _overview() -> str:
    lines = ["usage: jaxalign COMMAND [--help] [flags]", "", "commands:"]
    lines += [f"  {name:<12}{(c.config.__doc__ or '').splitlines()[0]}" for name, c in COMMANDS.items()]
    lines += ["", "jaxalign COMMAND --help lists the flags; --from-config RUN/config.json repeats a run."]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
