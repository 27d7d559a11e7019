"""Settings that a run may change as it goes on: none that its results depend on, unless another names the change."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from jaxalign.cli.main import main
from jaxalign.commands import COMMANDS
from jaxalign.commands.sft import main as sft
from jaxalign.config.effects import effective
from jaxalign.config.limits import settings, to_json
from jaxalign.config.offline import SFTConfig
from jaxalign.config.on_policy import GRPOAlgorithm, GRPOConfig
from jaxalign.config.shared import BestCheckpointConfig, LoraConfig, MeshConfig, OptimizerConfig
from jaxalign.mistake import Mistake
from jaxalign.run.folder import open_run
from tests.observed import observe
from tests.shared import final, on_one_device

# Settings that change no result, but by roundings; tests of batches, steps, engines and offloading compare the results.
ROUNDING = {"microbatches", "mesh.data", "mesh.fsdp", "mesh.tensor", "remat", "attention", "implementation", "slots"}
ROUNDING |= {"decode_layout", "offload_reference", "precompute_reference", "share_prompt"}
SHOWN = {"output", "resume", "profile", "check_kernels", "samples", "distributed", "eval_every", "max_dropped"}
SHOWN |= {
    "checkpoint.every",
    "checkpoint.minutes",
    "checkpoint.keep",
    "checkpoint.keep_best",
    "log.tensorboard",
    "log.wandb",
}
SHOWN |= {"steps", "epochs", "optimizer.extend", "engine", "engine_kind", "engine_reload", "reward_seconds"}
SHOWN |= {"algorithm.reference", "fingerprints"}


def changed(config, name):
    """The config with another value of a setting: a number or truth value stays one, a text stands for all others."""
    group, dot, inner = name.partition(".")
    if dot:
        return dataclasses.replace(config, **{group: changed(getattr(config, group), inner)})
    value = getattr(config, name)
    other = not value if isinstance(value, bool) else value + 1 if isinstance(value, int | float) else "another"
    return config if name == "output" else dataclasses.replace(config, **{name: other})


@pytest.mark.parametrize("command", [name for name, command in COMMANDS.items() if command.trains])
def test_a_run_that_goes_on_may_change_what_changes_no_result_and_nothing_else(command, tmp_path):
    kind = COMMANDS[command].config
    config = kind(model="m", data="d", output=tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"command": command, "config": to_json(config)}))
    refused, idle = set(), set()
    for name in settings(kind):
        if effective(changed(config, name)) == effective(config) and name != "output":
            idle.add(name)  # it has no effect beside the others, so neither has its change
        try:
            open_run(changed(config, name), command=command, resume=True, write=False)
        except Mistake as mistake:
            assert "another run" in str(mistake) and f"{name} was" in str(mistake)
            refused.add(name)
    assert refused == settings(kind).keys() - ROUNDING - SHOWN - idle
    assert {"lora.alpha", "lora.targets"} <= idle and len(idle) < 12


def test_a_run_of_an_older_version_keeps_its_rate_and_its_advantages(tmp_path):
    """Its config.json has the rate that was every command's default, and "batch" meant the std of all scores."""
    config = GRPOConfig(model="m", data="d", output=tmp_path, algorithm=GRPOAlgorithm(advantages="scores"))
    values = to_json(config)
    values["optimizer"] = {"learning_rate": 2e-5, "schedule": "cosine", "warmup_steps": 0}
    values["algorithm"]["advantages"] = "batch"
    (tmp_path / "config.json").write_text(json.dumps({"command": "grpo", "config": values}))
    assert open_run(config, command="grpo", resume=True, write=False)
    renamed = dataclasses.replace(config, algorithm=GRPOAlgorithm(advantages="batch"))
    with pytest.raises(Mistake, match=r"algorithm.advantages was 'scores', now 'batch'"):
        open_run(renamed, command="grpo", resume=True, write=False)
    other = dataclasses.replace(config, optimizer=OptimizerConfig(learning_rate=1e-6))
    with pytest.raises(Mistake, match=r"optimizer.learning_rate was 2e-05, now 1e-06"):
        open_run(other, command="grpo", resume=True, write=False)


RATES = {"sft": 2e-5, "dpo": 5e-7, "kto": 5e-7, "reward": 9e-6, "ppo": 3e-6}
RATES |= {"grpo": 1e-6, "rloo": 1e-6, "online-dpo": 5e-7}


@pytest.mark.parametrize("command", RATES)
def test_each_command_has_a_learning_rate_of_its_own_which_its_help_names(command, capsys):
    kind, rate = COMMANDS[command].config, RATES[command]
    config = kind(model="m", data="d", output=Path("o"))
    assert config.peak_learning_rate == rate
    assert dataclasses.replace(config, lora=LoraConfig(rank=4)).peak_learning_rate == pytest.approx(10 * rate)
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for number in (f"{rate:.0e}", f"{10 * rate:.0e}"):
        assert number.replace("e-0", "e-") in text, number


@pytest.fixture
def observed(tiny_model, tiny_data, tmp_path, monkeypatch):
    """(steps, OptimizerConfig) -> (learning rates, or the mistake); what it takes to be done is in checkpoints/."""

    def run(steps, *, fresh=False, **optimizer):
        config = SFTConfig(
            model=str(tiny_model),
            data=str(tiny_data),
            output=tmp_path / "run",
            steps=steps,
            max_length=48,
            mesh=MeshConfig(data=1, fsdp=8),
            optimizer=OptimizerConfig(**{"learning_rate": 1e-3} | optimizer),
        )
        observation = observe(config, monkeypatch, fresh=fresh)
        rates = [value for name, value in observation.seen if name == "learning rates"]
        return observation.mistake or np.array(rates[0][0], float)

    return run


def trained(folder, step, **extras):
    extras_file = folder / "run" / "checkpoints" / str(step) / "extras" / "metadata"
    extras_file.parent.mkdir(parents=True)
    extras_file.write_text(json.dumps(extras))


COSINE = {n: 1e-3 * (1 + np.cos(np.pi * np.arange(n) / n)) / 2 for n in (4, 8, 12)}


@pytest.mark.parametrize("extras", [{"schedule": [4]}, {}], ids=["recorded", "of an older version"])
def test_a_finished_run_gets_more_steps_only_with_a_word_about_its_schedule(extras, observed, tmp_path, caplog):
    assert "holds no run to extend" in str(observed(4, extend="restart"))
    np.testing.assert_allclose(observed(4, fresh=True), COSINE[4], rtol=1e-5)
    trained(tmp_path, 4, **extras)
    text = str(observed(8))
    assert "`steps` 8" in text and "was planned for 4" in text and "(it is 0.000146 at step 4)" in text
    assert "`optimizer.extend` stretch gives it that of 8 steps, 0.0005 at step 5" in text
    assert "`optimizer.extend` restart begins it anew after step 4, 0.001 at step 5" in text
    np.testing.assert_allclose(observed(8, extend="stretch"), COSINE[8], rtol=1e-5)
    with caplog.at_level("INFO"):
        np.testing.assert_allclose(observed(8, extend="restart"), [*COSINE[4], *COSINE[4]], rtol=1e-5, atol=1e-9)
    assert "planned for 4 steps; restart begins it anew after step 4" in caplog.text
    trained(tmp_path, 6, schedule=[4, 8])  # what the run did is known from then on
    np.testing.assert_allclose(observed(8), [*COSINE[4], *COSINE[4]], rtol=1e-5, atol=1e-9)
    trained(tmp_path, 8, schedule=[4, 8])  # also where the last checkpoint is damaged, and step 7 is taken again
    np.testing.assert_allclose(observed(8), [*COSINE[4], *COSINE[4]], rtol=1e-5, atol=1e-9)
    assert "was planned for 8" in str(observed(12))
    np.testing.assert_allclose(observed(12, extend="stretch"), [*COSINE[4], *COSINE[8]], rtol=1e-5, atol=1e-9)


def test_a_run_keeps_the_rate_that_it_began_with_where_none_is_given(observed, tmp_path):
    """Whatever the command's default has become since: the number is in config.json."""
    assert observed(4, fresh=True, learning_rate=None)[0] == pytest.approx(2e-5)
    described = json.loads((tmp_path / "run" / "config.json").read_text())
    assert described["config"]["optimizer"]["learning_rate"] == 2e-5
    described["config"]["optimizer"]["learning_rate"] = 7e-4
    (tmp_path / "run" / "config.json").write_text(json.dumps(described))
    assert observed(4, learning_rate=None)[0] == pytest.approx(7e-4)
    assert "optimizer.learning_rate was 0.0007, now 2e-05" in str(observed(4, learning_rate=2e-5))


def test_fewer_steps_bend_the_schedule_too(observed, tmp_path):
    observed(8, fresh=True)
    trained(tmp_path, 2, schedule=[8])
    text = str(observed(4))
    assert "was planned for 8" in text and "stretch" in text and "restart" not in text
    assert "restart" not in str(observed(4, extend="restart")).split("(it is")[1]
    np.testing.assert_allclose(observed(4, extend="stretch"), COSINE[4], rtol=1e-5)


def test_a_constant_rate_needs_no_word(observed, tmp_path):
    constant = {"schedule": "constant", "warmup_steps": 1}
    observed(4, fresh=True, **constant)
    trained(tmp_path, 4, schedule=[4])
    np.testing.assert_allclose(observed(8, **constant), [5e-4, *[1e-3] * 7], rtol=1e-6)
    assert "has no last step; leave it out" in str(observed(8, extend="restart", **constant))


def test_a_run_that_goes_on_elsewhere_in_other_parts_ends_the_same_but_for_roundings(tiny_model, tiny_data, tmp_path):
    """From one device to eight, from one microbatch to two, with other recomputation: the bound of microbatches."""
    config = SFTConfig(
        model=str(tiny_model),
        data=str(tiny_data),
        output=tmp_path / "whole",
        steps=4,
        batch_size=16,
        max_length=48,
        eval_share=0.0,
        remat="none",
        mesh=MeshConfig(data=1, fsdp=1),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        checkpoint=BestCheckpointConfig(every=2, keep=3),
    )
    with on_one_device():
        assert sft(config) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved" / "checkpoints" / "4")
    shutil.rmtree(tmp_path / "moved" / "final")
    moved = dataclasses.replace(config, output=tmp_path / "moved", mesh=MeshConfig(data=2, fsdp=4))
    moved = dataclasses.replace(moved, microbatches=2, remat="blocks", eval_every=3, implementation="chunked")
    assert sft(moved) == 0
    expected, actual = final(tmp_path / "whole"), final(tmp_path / "moved")
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, atol=1e-5, err_msg=name)
