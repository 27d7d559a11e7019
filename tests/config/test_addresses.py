"""Addresses where paths belong: every setting of every command, refused with the way out before heavy imports."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from jaxalign.commands import COMMANDS
from jaxalign.config.limits import check, settings, unpacked
from jaxalign.mistake import Mistake

# Settings whose values are words, an address, or text of a function: all others may name a file.
WORDS = {
    "engine",
    "engine_reload",
    "system",
    "stop",
    "prompts",
    "reward",
    "combine",
    "algorithm.loss",
    "step_separator",
}
NAMES = {"lora.targets", "log.wandb"}
PATHS = {"model", "data", "eval_data", "pretraining_data", "output", "tokenizer", "chat_template", "ref_model", "run"}
PATHS |= {"adapter", "critic.model"}


def replaced(config, name, value):
    group, dot, inner = name.partition(".")
    return dataclasses.replace(
        config, **{group: dataclasses.replace(getattr(config, group), **{inner: value}) if dot else value}
    )


def texts(kind):
    """Settings of a command that hold a text or a path."""
    hints = {name: unpacked(hint)[0] for name, hint in settings(kind).items()}
    return {name: hint for name, hint in hints.items() if hint in (str, Path, str | None, Path | None)}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_setting_that_names_a_file_takes_an_address(command, tmp_path):
    kind = COMMANDS[command].config
    assert texts(kind).keys() <= WORDS | NAMES | PATHS, "a new text: is it a path?"
    required = [f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING]
    config = kind(**{name: Path("x") if settings(kind)[name] is Path else "x" for name in required})
    check(config)
    for name, hint in texts(kind).items():
        value = "gs://bucket/run" if hint in (str, str | None) else Path("gs://bucket/run")
        if name in PATHS:
            with pytest.raises(
                Mistake, match=rf"`{name}` gs://bucket/run is an address.*mount it, as gcsfuse"
            ) as error:
                check(replaced(config, name, value))
            assert error.value.setting == name


@pytest.mark.parametrize("data", ["a.jsonl*0.7,s3://b/c.jsonl*0.3", "HTTPS://host/rows.jsonl", "hf://datasets/a/b"])
def test_a_part_of_a_mixture_and_an_address_of_the_web_are_refused_too(data):
    config = COMMANDS["sft"].config(model="m", data=data, output=Path("run"))
    with pytest.raises(Mistake, match=r"`data` .*://.* is an address"):
        check(config)


def test_an_address_is_answered_before_heavy_imports_and_the_address_of_a_server_is_one(tmp_path):
    code = (
        "import sys; from jaxalign.cli.main import main\n"
        "sft = ['sft', '--model', 'm', '--data', 'd']\n"
        "grpo = ['grpo', '--model', 'm', '--data', 'd', '--output', 'run', '--reward']\n"
        "print(main([*sft, '--output', 'gs://b/run']), main([*sft, '--from-config', 's3://b/run']))\n"
        "print(main(['generate', '--model', 'm', '--prompts', 'gs://b/p.jsonl']))\n"
        "print(main([*grpo, 'length(target=3) + 0.5*reward_model(path=\"abfs://b/rm\")', '--engine', 'http://h:1']))\n"
        "print([m for m in ('jax', 'flax', 'transformers', 'datasets', 'orbax', 'grain') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.splitlines() == ["2 2", "2", "2", "[]"], done.stderr
    names = "--output gs://b/run", "--from-config s3://b/run", "--prompts gs://b/p.jsonl", "--reward: abfs://b/rm"
    for name, line in zip(names, done.stderr.splitlines(), strict=True):
        assert f"{name} is an address" in line
    assert not list(tmp_path.iterdir())
