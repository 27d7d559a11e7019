"""The documents tell the truth: their code runs, their commands parse, and what they name is there.

Python blocks of a file run one after the other in one namespace and an empty folder, with examples/ on the path. Two
kinds do not run: one that begins with `# before` shows two styles, and one that begins with `# examples/FILE.py` quotes
that file, word for word. Lines of sh, bash and console blocks are commands: those of jaxalign are parsed, with words in
capitals for whatever a reader fills in, and of those that only a fresh machine can run the files and extras must exist.
Every other block is text and says so.
"""

import ast
import json
import re
import shlex
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["README.md", "CONTRIBUTING.md", "docs/*.md", "examples/*.md"]
DOCUMENTS = [path for name in NAMES for path in sorted(ROOT.glob(name))]
SHELLS = "sh", "bash", "console"
KNOWN = ".", "bash", "cd", "export", "git", "pip", "pre-commit", "pytest", "python", "ruff", "source", "tail", "tmux"
FENCE = re.compile(r"^( *)```([^\n`]*)\n(.*?)^\1```\s*$", re.M | re.S)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FILE = re.compile(r"(?<![\w/.:-])((?:jaxalign|tests|examples|experiments|docs|\.ci)/[\w./-]*\w/?)")
PLACEHOLDER = re.compile(r"[A-Z][A-Z_0-9]+|N|K")


class Block(NamedTuple):
    language: str
    line: int
    text: str


def blocks(path, languages=None):
    text = path.read_text()
    result = []
    for match in FENCE.finditer(text):
        body = "".join(line.removeprefix(match[1]) for line in match[3].splitlines(keepends=True))
        result.append(Block(match[2].strip(), text[: match.start()].count("\n") + 2, body))
    return [block for block in result if languages is None or block.language in languages]


def commands(block):
    """The simple commands of a shell block, as words; comments aside, and output where a console shows prompts."""
    text = block.text.replace("\\\n", " ")
    lines = text.splitlines()
    if block.language == "console" and any(line.startswith("$ ") for line in lines):
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    for line in lines:
        words = shlex.split(line, comments=True)
        while words:
            end = next((i for i, word in enumerate(words) if word in ("&&", ";", "|", "&")), len(words))
            if words[:end]:
                yield words[:end]
            words = words[end + 1 :]


def assigned(words):
    """(variables that stand before a command, the command)"""
    count = next((i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)), len(words))
    return words[:count], words[count:]


def check_jaxalign(arguments, folder):
    """Raises Mistake unless the arguments are a command and its flags; placeholders may stand for numbers and words."""
    from jaxalign.cli.main import parse
    from jaxalign.commands import COMMANDS
    from jaxalign.config.limits import settings
    from jaxalign.mistake import Mistake

    if arguments[:1] == ["COMMAND"]:
        arguments = ["sft", *arguments[1:]]
    if "--from-config" in arguments:
        place = arguments.index("--from-config") + 1
        required = {n: "x" for n in ("model", "data", "output") if n in settings(COMMANDS[arguments[0]].config)}
        (folder / "config.json").write_text(json.dumps(required))
        arguments = [*arguments[:place], str(folder / "config.json"), *arguments[place + 1 :]]
    try:
        parse(arguments)
    except Mistake:
        numbers = ["1" if PLACEHOLDER.fullmatch(word) else word for word in arguments]
        if numbers == arguments:
            raise
        parse(numbers)
    except SystemExit as end:  # --help, --version
        assert end.code in (0, None)


def check_pip(arguments):
    """Requires that extras of an installation from this folder exist."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in arguments:
        if match := re.fullmatch(r"(?:\.|jaxalign)\[([\w,]+)\]", word):
            assert set(match[1].split(",")) <= set(extras), f"{word}: the extras are {', '.join(extras)}"


def check(words, folder):
    variables, words = assigned(words)
    for variable in variables:
        name, _, value = variable.partition("=")
        assert name != "PYTHONPATH" or (ROOT / value).is_dir(), f"{variable}: no such folder"
    if not words:
        return
    program, *arguments = words
    program = re.sub(r"^python3$", "python", program.rpartition("/")[2] if "/" in program else program)
    if program == "python" and arguments[:2] == ["-m", "jaxalign"]:
        program, arguments = "jaxalign", arguments[2:]
    if program == "python" and arguments[:2] == ["-m", "pip"]:
        program, arguments = "pip", arguments[2:]
    if program == "jaxalign":
        return check_jaxalign(arguments, folder)
    assert program in KNOWN, f"{program!r} is none of {', '.join(KNOWN)}: add it there, or make the block text"
    if program == "pip":
        return check_pip(arguments)
    if program in ("python", "bash", "pytest"):
        files = [word for word in arguments if re.fullmatch(r"[\w./-]+(\.py|/run)", word)]
        for word in [word for word in arguments if FILE.fullmatch(word)] + files:
            assert (ROOT / word).exists(), f"{word} does not exist"


@pytest.fixture
def own_tables(monkeypatch):
    """Tables that a block may add to; they are as before after the test."""
    from jaxalign.models.files import families

    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))


def runnable(block):
    """Python that runs here; `torch` is no dependency of the package."""
    if block.text.startswith(("# before", "# examples/")):
        return False
    if re.search(r"^(import|from) torch\b", block.text, re.M):
        pytest.importorskip("torch")
    return True


@pytest.mark.parametrize("path", [p for p in DOCUMENTS if blocks(p, ["python"])], ids=lambda p: p.name)
def test_python_blocks_run(path, tmp_path, monkeypatch, own_tables):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    namespace = {"__name__": path.stem}
    for block in blocks(path, ["python"]):
        if runnable(block):
            # as many empty lines as stand before it, so that a traceback shows the line of the document
            exec(compile("\n" * (block.line - 1) + block.text, str(path), "exec"), namespace)
    for name in ("own_loss", "own_reward", "own_algorithm"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_quotes_of_examples_are_word_for_word(path):
    for block in blocks(path, ["python"]):
        if match := re.match(r"# (examples/\S+)\n", block.text):
            assert block.text[match.end() :].rstrip() in (ROOT / match[1]).read_text(), f"line {block.line}"


@pytest.mark.parametrize("path", [p for p in DOCUMENTS if blocks(p, SHELLS)], ids=lambda p: p.name)
def test_commands_parse(path, tmp_path, capsys):
    for block in blocks(path, SHELLS):
        for words in commands(block):
            try:
                check(words, tmp_path)
            except Exception as error:
                raise AssertionError(f"{path.name}, block of line {block.line}: {shlex.join(words)}") from error


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_blocks_say_what_they_are(path):
    assert path.read_text().count("```") % 2 == 0
    for block in blocks(path):
        assert block.language in ("python", "text", *SHELLS), f"line {block.line}: {block.language or 'no language'}"


def without_blocks(path):
    return FENCE.sub("", path.read_text())


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_somewhere(path):
    for target in LINK.findall(without_blocks(path)):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        there = path if not name else path.parent / name
        assert there.exists(), f"{target} does not exist"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text(), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}, target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_files_and_modules_that_are_named_exist(path):
    """Whole paths anywhere; behind backquotes also paths within the package, as in `losses/contract.py`."""
    text = without_blocks(path)
    named = [(name, [ROOT / name]) for name in FILE.findall(text)]
    for name in re.findall(r"`([\w/]+\.py)(?::[^`]*)?`", text):
        named.append((name, [ROOT / name, ROOT / "jaxalign" / name, path.parent / name]))
    absent = sorted({name for name, places in named if not any(place.exists() for place in places)})
    assert not absent, f"{', '.join(absent)} do not exist"


def test_examples_import_public_names_only():
    for path in sorted((ROOT / "examples").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
                assert not any(name.startswith("_") and name != "__future__" for name in names), path.name


@pytest.mark.parametrize(
    "line",
    [
        "jaxalign dpo --model MODEL --data PAIRS --output RUN --no-such-flag 1",
        "jaxalign dop --model MODEL",
        "jaxalign sft --model MODEL --data DATA --output RUN --steps many",
        "pip install -e '.[no_such_extra]'",
        "python examples/no_such_file.py",
        "PYTHONPATH=no_such_folder jaxalign quickstart",
        "no_such_program",
    ],
)
def test_a_command_that_cannot_run_is_found(line, tmp_path):
    block = Block("console", 1, f"$ {line}\nits output\n")
    with pytest.raises((AssertionError, ValueError)):
        for words in commands(block):
            check(words, tmp_path)


def test_a_placeholder_stands_for_a_number_too(tmp_path):
    assert [*commands(Block("console", 1, "ruff check .\nls\n"))] == [["ruff", "check", "."], ["ls"]]
    lines = "jaxalign sft --model M --data D --output RUN \\\n  --steps N  # a comment\njaxalign COMMAND --help\n"
    parsed = list(
        commands(Block("sh", 1, lines + "jaxalign sft --from-config RUN/config.json && jaxalign --version\n"))
    )
    assert [words[1] for words in parsed] == ["sft", "COMMAND", "sft", "--version"]
    for words in parsed:
        check(words, tmp_path)
