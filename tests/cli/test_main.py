"""The program itself: its overview, the help of every field, and --from-config."""

import dataclasses
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

import jaxalign
from jaxalign.cli.main import COMMANDS, main, parse
from jaxalign.config import shared
from jaxalign.config.limits import from_json, to_json
from jaxalign.config.offline import SFTConfig


def fields(kind, prefix="--"):
    """Every flag of a config, dotted where configs are nested, with the class and field that it stands for."""
    for field in dataclasses.fields(kind):
        flag = prefix + field.name.replace("_", "-")
        inner = get_type_hints(kind)[field.name]
        if dataclasses.is_dataclass(inner):
            yield from fields(inner, f"{flag}.")
        else:
            yield flag, kind, field.name


def help_line(kind, name):
    """The docstring under a field, as it stands in the source of the class that declares it."""
    owner = next(c for c in kind.__mro__ if name in c.__annotations__)
    lines = re.split(rf"\nclass {owner.__name__}\b.*:", inspect.getsource(sys.modules[owner.__module__]))[
        1
    ].splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(f"    {name}: "))
    text = " ".join(lines[at + 1 :]).replace("\\", "").split('"""')[1]
    return " ".join(text.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_every_field_with_its_line(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    shown = "".join(capsys.readouterr().out.replace("│", " ").split())
    names = list(fields(COMMANDS[command].config))
    assert names
    for flag, kind, name in names:
        told = help_line(kind, name)
        assert len(told) > 10 and "".join(told.split()) in shown, flag
        assert flag in shown, flag


def test_the_overview_names_every_command_with_its_first_line(capsys):
    for arguments in ([], ["--help"], ["-h"]):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        shown = capsys.readouterr().out
        assert end.value.code == 0
        for command, (kind, *_) in COMMANDS.items():
            assert f"  {command}" in shown and kind.__doc__.splitlines()[0] in shown


def test_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out.strip() == jaxalign.__version__
    output = subprocess.check_output([sys.executable, "-m", "jaxalign", "--version"], text=True)
    assert output.strip() == jaxalign.__version__


def test_help_and_a_wrong_flag_load_nothing_heavy():
    heavy = "jax", "flax", "transformers", "datasets", "orbax", "grain", "numpy"
    code = (
        "import sys; from jaxalign.cli.main import main\n"
        "for words in (['--help'], ['sft', '--help'], ['sft', '--lr', '1']):\n"
        "    try: main(words)\n"
        "    except SystemExit: pass\n"
        f"print([m for m in {heavy!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_config_survives_json_and_every_command_has_one_that_is_complete(tmp_path):
    changed = SFTConfig(model="m", data="d", output=tmp_path, steps=3, mesh=shared.MeshConfig(data=2))
    again = from_json(SFTConfig, json.loads(json.dumps(to_json(changed))))
    assert again == changed and isinstance(again.output, Path)
    with pytest.raises(ValueError, match="has no data, output; add it, for it has no default"):
        from_json(SFTConfig, {"model": "m"})
    with pytest.raises(ValueError, match=r"optimizer: b1 is True, and must be float"):
        from_json(SFTConfig, to_json(changed) | {"optimizer": {"b1": True}})


@pytest.mark.parametrize("form", ["--from-config {run}/config.json", "--from-config={run}/config.json"])
def test_other_flags_override_what_from_config_gives(form, tmp_path):
    config = SFTConfig(model="m", data="d", output=tmp_path / "run", steps=3, optimizer=shared.OptimizerConfig(b2=0.5))
    (tmp_path / "config.json").write_text(json.dumps({"command": "sft", "config": to_json(config)}))
    flags = form.format(run=tmp_path).split(" ")
    assert parse(["sft", *flags]) == ("sft", config)
    _, chosen = parse(["sft", *flags, "--steps", "5", "--optimizer.b1", "0.7"])
    optimizer = dataclasses.replace(config.optimizer, b1=0.7)
    assert chosen == dataclasses.replace(config, steps=5, optimizer=optimizer)


@pytest.mark.parametrize(
    ("command", "setting", "text"),
    [
        ("sft", "algorithm.loss", "stray:mine"),
        ("dpo", "algorithm.loss", "dpo + 0.1*stray:mine(x=1)"),
        ("reward", "combine", "stray:mine"),
        ("grpo", "reward", "length(target=3) + stray:mine"),
        ("ppo", "reward", "reward_model(path='m', rule='stray:mine')"),
        ("generate", "reward", "stray:mine"),
    ],
)
def test_a_config_file_makes_no_code_run_that_the_command_line_does_not_name(
    command, setting, text, tmp_path, monkeypatch, capsys
):
    (tmp_path / "stray.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')\ndef mine(*_, **__): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    group, _, name = setting.rpartition(".")
    values = {"model": "m", "data": "d", "output": str(tmp_path / "run")} if command != "generate" else {}
    values |= {"model": "m", "prompts": "hi"} if command == "generate" else {}
    values |= {group: {name: text}} if group else {name: text}
    (tmp_path / "config.json").write_text(json.dumps({"command": command, "config": values}))
    arguments = [command, "--from-config", str(tmp_path / "config.json")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert f"--from-config names code of its own for --{setting}: {text}" in error and "Traceback" not in error
    assert not (tmp_path / "trace").exists()
    assert parse([*arguments, f"--{setting}={text}"])  # the user's own word


def test_from_config_repeats_a_run_bit_for_bit(tiny_model, tiny_data, tmp_path, one_device):
    flags = ["--steps", "2", "--max-length", "48", "--remat", "none", "--samples", "0"]
    first, again = tmp_path / "first", tmp_path / "again"
    assert main(["sft", "--model", str(tiny_model), "--data", str(tiny_data), "--output", str(first), *flags]) == 0
    assert main(["sft", "--from-config", str(first / "config.json"), "--output", str(again)]) == 0
    weights = [(folder / "final" / "model.safetensors").read_bytes() for folder in (first, again)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("end", "status", "message"),
    [
        ("sys.exit(0)", 2, "jaxalign: error: code that the command ran called sys.exit(0)"),
        ("os._exit(0)", 1, "jaxalign: error: code that the command ran called os._exit(0)"),
        ("os._exit(3)", 3, "jaxalign: error: code that the command ran called os._exit(3)"),
        ("os.fork() or os._exit(0)", 0, ""),
    ],
)
def test_code_that_a_command_runs_does_not_end_it_with_status_0_or_without_a_word(end, status, message):
    code = (
        "import os, sys; from jaxalign.cli import main\n"
        "class Command:\n"
        "    config, trains = main.COMMANDS['generate'].config, False\n"
        f"    def load(self): return lambda config: ({end}) and None\n"
        "main.COMMANDS['generate'] = Command()\n"
        "sys.exit(main.main(['generate', '--model', 'm', '--prompts', 'the cat']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (status, message)
