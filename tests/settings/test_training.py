"""A command shows only the settings that it obeys: each, set to another value, changes the run or is refused.

What is compared is in tests/observed.py: data, shapes, calls, schedule, and the jaxpr of the train step.
"""

import dataclasses

import jax
import pytest

from jaxalign.commands import COMMANDS
from jaxalign.config.offline import SFTConfig
from tests.observed import difference, observe
from tests.settings.cases import (
    BASES,
    CONTEXTS,
    EVERYWHERE,
    LOSSES,
    OFFLINE,
    PER_COMMAND,
    TRAINING,
    VALUES,
    config_of,
    disobeyed,
)


@pytest.mark.parametrize("command", TRAINING)
def test_every_setting_of_a_command_that_trains_changes_its_run_or_is_refused(command, files, monkeypatch):
    kind, values = COMMANDS[command].config, EVERYWHERE | BASES[command]
    contexts = CONTEXTS | {name: context for (of, name), context in PER_COMMAND.items() if of == command}
    other_data = BASES[command]["data"].replace("{", "{other_")
    others = VALUES | {"algorithm.loss": LOSSES[command], "data": other_data, "eval_data": other_data}
    if command not in OFFLINE:
        others |= {"batch_size": 16}

    def run(config):
        if config.resume is False:  # a setting of the second call
            observe(dataclasses.replace(config, resume=True), monkeypatch)
        return observe(config, monkeypatch, fresh=config.resume)

    assert not disobeyed(kind, values, files, run, contexts=contexts, others=others)


def test_a_setting_that_nothing_reads_is_found(files, monkeypatch):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class WithUnused(SFTConfig):
        unused: bool = False

    monkeypatch.setitem(COMMANDS, "sft", COMMANDS["sft"]._replace(config=WithUnused))
    monkeypatch.setattr("tests.settings.cases.settings", lambda kind: {"unused": bool, "seed": int})
    values = EVERYWHERE | BASES["sft"]

    def run(config):
        return observe(config, monkeypatch)

    reasons = disobeyed(WithUnused, values, files, run, contexts={}, others={})
    assert reasons == ["unused=True changes nothing"]


@pytest.mark.parametrize("command", [name for name in TRAINING if name not in OFFLINE])
def test_a_step_and_its_responses_share_no_name_of_a_metric(command, files, monkeypatch):
    """Also where reward functions are called as metrics are: their scores are scores/<name>."""
    reward = "tests.commands.rewards:chosen + tests.commands.rewards:margins"
    values = EVERYWHERE | BASES[command] | {"reward": reward}
    observed = observe(config_of(COMMANDS[command].config, values, files), monkeypatch)
    program = observed.program
    _, of_step = jax.eval_shape(program.step, program.like, program.frozen, observed.batch)
    assert {"scores/chosen", "scores/margins"} <= set(observed.metrics)
    assert not set(observed.metrics) & set(of_step)


@pytest.mark.parametrize("command", TRAINING)
def test_the_same_settings_are_the_same_observation(command, files, monkeypatch):
    """Otherwise the comparison would find differences that no setting makes."""
    config = config_of(COMMANDS[command].config, EVERYWHERE | BASES[command], files)
    first, second = observe(config, monkeypatch), observe(config, monkeypatch)
    assert first.mistake is None and difference(first, second) is None
