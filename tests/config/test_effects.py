"""A setting that was given and has no effect is refused by its name, in every command."""

import dataclasses
from pathlib import Path

import pytest

from jaxalign.cli.main import main
from jaxalign.commands import COMMANDS
from jaxalign.config import effects
from jaxalign.config.limits import check, from_json, settings, to_json
from jaxalign.mistake import Mistake
from jaxalign.run.folder import open_run

REQUIRED = {"model": "m", "data": "d.jsonl", "output": Path("out"), "prompts": "p", "run": Path("run")}
GIVEN = {"lora.alpha": 8.0, "lora.targets": "q_proj", "lora.rslora": True, "lora.dora": True, "lora.quantise": "int8"}
GIVEN |= {"epochs": 2.0, "eval_share": 0.2, "ref_update.alpha": 0.3, "combine": "min", "engine_kind": "sglang"}
GIVEN |= {"engine_reload": "/load", "decode_layout": "training", "cache_dtype": "int8", "precision": "bfloat16"}
GIVEN |= {"eval_every": 1, "algorithm.kl_estimator": "k2", "algorithm.kl_in": "loss", "algorithm.halt_kl": 0.1}
GIVEN |= {"algorithm.importance_cap": 3.0, "algorithm.value_clip_epsilon": 0.5, "critic.learning_rate": 1e-3}
GIVEN |= {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
GIVEN |= {"top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 1, "reward_seconds": 5.0, "keep": "best"}
UNFIT = {"members": 1, "n": 1, "top_p": 1.0, "algorithm.epochs": 1, "temperature": 0.0, "steps": 3, "samples": 0}
UNFIT |= {"eval_data": "e.jsonl", "algorithm.value_coef": 0.0, "algorithm.kl_coef": 0.0}
FIT = {"lora.rank": 2, "steps": None, "eval_data": None, "ref_update.every": 1, "members": 2, "samples": 1, "n": 2}
FIT |= {"algorithm.kl_coef": 0.1, "top_p": 0.5, "algorithm.epochs": 2, "algorithm.value_coef": 0.1, "reward": "length"}
FIT |= {"temperature": 1.0, "keep": "best"}


def cases():
    for command, (kind, *_) in COMMANDS.items():
        known = settings(kind)
        for row in effects.EFFECTS:
            others = [other for other in row.others if other in known]
            for name in row.names:
                if name in known and others and (not row.of or row.of in known):
                    yield pytest.param(command, row, name, id=f"{command} {name} {others[0]}")


def made(kind, values):
    """A config from dotted names."""
    config = kind(**{name: value for name, value in REQUIRED.items() if name in settings(kind)})
    for name, value in values.items():
        group, dot, inner = name.partition(".")
        changed = dataclasses.replace(getattr(config, group), **{inner: value}) if dot else value
        config = dataclasses.replace(config, **{group: changed})
    return config


@pytest.mark.parametrize("command, row, name", list(cases()))
def test_it_is_refused_by_its_name_and_goes_where_another_setting_fits(command, row, name):
    kind = COMMANDS[command].config
    known = settings(kind)
    unfit = {other: UNFIT[other] for other in row.others if other in known and other in UNFIT}
    if "engine" in row.others and row.others["engine"](None):
        unfit["engine"] = "http://user:secret@localhost"
    bare = made(kind, unfit)
    config = made(kind, unfit | {name: GIVEN[name]})
    with pytest.raises(Mistake, match=f"`{name}` .* has no effect with") as caught:
        check(config)
    assert caught.value.setting == name and "secret" not in str(caught.value)
    assert effects.effective(config) == bare and effects.effective(config, of=bare) == config
    fit = {other: FIT[other] for other in row.others if other in known and other in FIT}
    if "engine" in row.others:
        fit["engine"] = None if row.others["engine"](None) else "http://localhost"
    if name == "keep":
        fit |= {"n": 2, "reward": "length"}
    check(made(kind, fit | {name: GIVEN[name]}))


def test_a_run_that_was_begun_with_such_a_setting_goes_on_without_it(tmp_path):
    kind = COMMANDS["sft"].config
    older = made(kind, {"output": tmp_path, "lora.alpha": 8.0, "epochs": 2.0, "steps": 3})
    open_run(older, command="sft", resume=True, write=True)
    assert open_run(made(kind, {"output": tmp_path, "steps": 5}), command="sft", resume=True, write=True)
    with pytest.raises(Mistake, match="seed was 0, now 1"):
        open_run(made(kind, {"output": tmp_path, "steps": 5, "seed": 1}), command="sft", resume=True, write=True)


def test_a_file_of_settings_may_hold_what_other_flags_take_the_effect_of(tmp_path, capsys):
    kind = COMMANDS["sft"].config
    path = tmp_path / "config.json"
    open_run(made(kind, {"output": tmp_path, "epochs": 2.0}), command="sft", resume=True, write=True)
    flags = ["sft", "--from-config", str(path), "--steps", "5", "--data", "/none.jsonl"]
    assert main(flags) == 2 and "--data: data file /none.jsonl does not exist" in capsys.readouterr().err
    assert (
        main([*flags, "--epochs", "3"]) == 2 and "--epochs 3.0 has no effect with --steps 5" in capsys.readouterr().err
    )


DAMAGED = {
    "steps": ["5", True, 1.5, 0, -1, 10**400, [], {}, float("nan")],
    "epochs": ["1", 0, -1, float("inf"), float("nan"), 10**400, None],
    "optimizer": [None, [], 3, {"b1": "0.9"}, {"b1": 1}, {"schedule": ["cosine"]}, {"unknown": 1}, {"b1": None}],
    "model": [None, 3, "", "a\0b", "\ud800", ["m"]],
    "output": [None, 3, "", "\udcff"],
    "algorithm": [{"loss": 3}, {"loss": None}, "dpo"],
    "turns": ["most", None, []],
    "unknown": [1],
}


@pytest.mark.parametrize("name", DAMAGED)
def test_every_field_of_a_file_of_settings_is_checked_for_its_type_and_limits(name):
    kind = COMMANDS["sft"].config
    whole = to_json(made(kind, {}))
    assert from_json(kind, whole) == made(kind, {})
    for value in DAMAGED[name]:
        with pytest.raises(Mistake, match=r"run/config\.json.*" + name) as caught:
            from_json(kind, whole | {name: value}, where="run/config.json")
        assert str(caught.value).isprintable() and len(str(caught.value)) < 2000


@pytest.mark.parametrize("command", COMMANDS)
def test_numbers_that_no_machine_holds_are_refused(command):
    kind = COMMANDS[command].config
    for name, hint in settings(kind).items():
        plain = str(hint)
        for value in [float("nan"), float("inf"), 10**400] if "float" in plain else [2**40] if "int" in plain else []:
            with pytest.raises(Mistake, match=f"`{name}`"):
                check(made(kind, {name: value}))
