"""Tables that could disagree: the commands, the classes of their settings, the model card, and the README."""

import dataclasses
import importlib
import inspect
import re
from pathlib import Path

import jax
import pytest

from jaxalign.commands import COMMANDS, name_of
from jaxalign.config import offline, on_policy
from jaxalign.models.files.families import model_config
from jaxalign.models.places import make_mesh
from jaxalign.run.final import model_card
from jaxalign.training import part
from jaxalign.training.program import compile_step
from tests.models.tiny import TINY

TRAINING = {name: command for name, command in COMMANDS.items() if command.trains}
REQUIRED = {"model": "config:x", "data": "rows.jsonl", "output": Path("run")}


@pytest.fixture(params=TRAINING)
def command(request):
    return request.param


def test_a_training_command_has_a_main_and_a_recipe_of_config_model_and_mesh(command):
    module = importlib.import_module(COMMANDS[command].module)
    assert COMMANDS[command].load() is module.main
    assert list(inspect.signature(module.main).parameters) == ["config"]
    assert list(inspect.signature(module.recipe).parameters) == ["config", "model", "mesh"]


def test_the_name_of_a_config_is_that_of_its_command(command):
    assert name_of(COMMANDS[command].config(**REQUIRED)) == command


def test_the_model_card_names_the_command(command, tmp_path):
    config = COMMANDS[command].config(**REQUIRED | {"output": tmp_path})
    (tmp_path / "metrics.jsonl").write_text("")
    card = model_card(config, name_of(config), 3)
    assert f"tags: [jaxalign, {command}]" in card and f"3 steps of `{command}` on rows.jsonl" in card


@pytest.mark.parametrize("module", [offline, on_policy])
def test_a_class_of_settings_that_no_other_extends_belongs_to_one_command(module):
    classes = [
        kind
        for name, kind in vars(module).items()
        if name.endswith("Config") and kind.__module__ == module.__name__ and "output" in kind.__dataclass_fields__
    ]
    owners = [command.config for command in TRAINING.values()]
    assert len(owners) == len(set(owners))
    for kind in classes:
        is_leaf = not any(other is not kind and issubclass(other, kind) for other in classes)
        assert owners.count(kind) == 1 if is_leaf else owners.count(kind) <= 1, kind


def test_the_readme_names_every_training_command(command):
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    assert re.search(rf"^jaxalign {command} --", readme, re.MULTILINE), command


def test_a_recipe_needs_shapes_only(command, monkeypatch):
    """Its step can be compiled for a model of which nothing but the config exists."""

    def refuse(*arguments, **keywords):
        raise AssertionError("a recipe reads no weights")

    for name in ("load_params", "init_params", "init_adapter", "load_reward_params"):
        monkeypatch.setattr(part, name, refuse)
    module, config = importlib.import_module(COMMANDS[command].module), COMMANDS[command].config(**REQUIRED)
    for rank in (0, 2):
        config = dataclasses.replace(config, lora=dataclasses.replace(config.lora, rank=rank))
        recipe = module.recipe(
            config, model_config(TINY["llama"] | {"architectures": ["LlamaForCausalLM"]}), make_mesh()
        )
        program = compile_step(config, recipe, make_mesh(), steps=2)
        leaves = jax.tree.leaves((recipe.part.trained, recipe.part.frozen, program.like, program.frozen))
        assert leaves and all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
