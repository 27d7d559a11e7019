"""Files that a run left, damaged: of its settings, its model's mark, and the reference's log-probabilities."""

import dataclasses
import json

import numpy as np
import pytest

from jaxalign.cli.main import main
from jaxalign.config.limits import to_json
from jaxalign.config.offline import SFTConfig
from jaxalign.mistake import Mistake
from jaxalign.run import reference_logps
from jaxalign.run.folder import open_run, trained_steps

DAMAGED = {
    "[]": "holds [], not an object",
    "7": "holds 7, not an object",
    "null": "not an object",
    "{": "is not JSON",
    "[" * 10**5: "nested too deeply",
    '{"command": "sft"}': "no 'command' and 'config'",
    '{"command": ["sft"], "config": {}}': "'command' is ['sft']; it must be a text",
    '{"command": "sft", "config": []}': "'config' is []; it must be an object",
    '{"command": "sft", "config": {}}': "has no model, data, output",
    '{"command": "sft", "config": {"model": "m", "data": "d", "output": "o", "steps": "3"}}': "steps is '3'",
    '{"command": "sft", "config": {"model": "m", "data": "d", "output": "o", "lora": []}}': "lora is [], and must",
    '{"command": "sft", "config": {"model": "m", "data": "d", "output": "o", "steps": 0}}': "steps 0: it must be",
}


@pytest.mark.parametrize("content", DAMAGED, ids=list(DAMAGED.values()))
def test_a_damaged_description_of_a_run_is_named_by_what_reads_it(content, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(content)
    (tmp_path / "d.jsonl").write_text("{}")
    sft = ["sft", "--model", "m", "--data", str(tmp_path / "d.jsonl"), "--output", str(tmp_path / "run")]
    commands = [sft, ["sft", "--from-config", str(tmp_path / "run")]]
    if not DAMAGED[content].startswith(("has no", "steps", "lora")):  # export looks at those after heavy imports
        commands.append(["export", "--run", str(tmp_path / "run"), "--output", str(tmp_path / "out")])
    for command in commands if "and 'config'" not in DAMAGED[content] else [sft]:
        assert main(command) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert "run/config.json" in line and DAMAGED[content] in line.replace("--", "")


def test_files_of_the_users_own_are_no_reason_to_refuse_a_folder(tmp_path):
    config = SFTConfig(model="m", data="d", output=tmp_path)
    for name in (".DS_Store", "train.log", "nohup.out"):
        (tmp_path / name).write_text("x")
    assert not open_run(config, command="sft", resume=True, write=True)
    assert json.loads((tmp_path / "config.json").read_text())["config"] == to_json(config)
    (tmp_path / "config.json").unlink()
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(Mistake, match=r"holds metrics\.jsonl of a run, and no config\.json"):
        open_run(dataclasses.replace(config), command="sft", resume=True, write=True)


@pytest.mark.parametrize(
    "content", ["[]", "7", "null", "{}", '{"trained_steps": "3"}', '{"trained_steps": true}', "{", "\xff"]
)
def test_a_damaged_mark_says_nothing(content, tmp_path):
    (tmp_path / "jaxalign.json").write_bytes(content.encode("latin-1"))
    assert trained_steps(tmp_path) is None
    (tmp_path / "jaxalign.json").write_text('{"trained_steps": 3}')
    assert trained_steps(tmp_path) == 3


def test_stored_log_probabilities_that_are_damaged_are_computed_anew(tmp_path, caplog):
    path, key, values = tmp_path / "reference" / "1.npz", {"model": 1}, np.ones((3, 2), np.float32)
    assert reference_logps.read(path, key, (3, 2)) is None
    reference_logps.write(path, key, values)
    np.testing.assert_array_equal(reference_logps.read(path, key, (3, 2)), values)
    assert reference_logps.read(path, {"model": 2}, (3, 2)) is None
    assert reference_logps.read(path, key, (2, 3)) is None and not caplog.records
    whole = path.read_bytes()
    for content in (b"", b"{}", whole[:-30], whole[:40], b"PK" + whole[2:60]):
        path.write_bytes(content)
        assert reference_logps.read(path, key, (3, 2)) is None
    np.save(path.with_suffix(".npy"), values)
    path.write_bytes(path.with_suffix(".npy").read_bytes())  # an array, no archive
    assert reference_logps.read(path, key, (3, 2)) is None and len(caplog.records) == 6
    for other in (values * np.nan, values.astype(np.float64), np.array(["a"])):
        reference_logps.write(path, key, other)
        assert reference_logps.read(path, key, (3, 2)) is None
    for stored in ("[" * 10**5, "{"):
        np.savez(path, logps=values, key=stored)
        assert reference_logps.read(path, key, (3, 2)) is None
