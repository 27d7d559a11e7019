"""`jaxalign export`: which checkpoint of a run becomes a folder, and that the folder is that checkpoint."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxalign.commands import export, sft
from jaxalign.config.inference import ExportConfig
from jaxalign.config.offline import SFTConfig
from jaxalign.config.shared import BestCheckpointConfig, MeshConfig, OptimizerConfig
from jaxalign.run import final
from jaxalign.training.metrics import read_rows
from tests.shared import on_one_device


@pytest.fixture(scope="module")
def run(tiny_model, tiny_data, tmp_path_factory):
    """Six steps on answers of cats, held out answers of dogs: their loss rises, so the best checkpoint is the first."""
    folder = tmp_path_factory.mktemp("exported")
    dogs = [{"prompt": f"{word} ?", "completion": "two dogs , red to blue ."} for word in ("a", "one", "runs")]
    (folder / "dogs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in dogs))
    config = SFTConfig(
        model=str(tiny_model),
        data=str(tiny_data),
        eval_data=str(folder / "dogs.jsonl"),
        output=folder / "run",
        steps=6,
        max_length=48,
        remat="none",
        samples=0,
        eval_every=2,
        mesh=MeshConfig(data=1, fsdp=1),
        optimizer=OptimizerConfig(learning_rate=0.05, schedule="constant"),
        checkpoint=BestCheckpointConfig(every=2, keep=2, keep_best=1),
    )
    with on_one_device():
        assert sft.main(config) == 0
    return config


def exported(run, output, **choice):
    export.main(ExportConfig(run=run.output, output=output, **choice))
    return load_file(output / "model.safetensors"), json.loads((output / "jaxalign.json").read_text())["trained_steps"]


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_the_newest_is_what_the_run_ended_with_and_an_earlier_step_is_not(run, tmp_path):
    final = load_file(run.output / "final" / "model.safetensors")
    newest, at = exported(run, tmp_path / "newest")
    assert at == 6 and same(newest, final)
    earlier, at = exported(run, tmp_path / "earlier", step=4)
    assert at == 4 and not same(earlier, final)


def test_best_is_the_step_of_lowest_held_out_loss(run, tmp_path):
    losses = {row["step"]: row["eval_loss"] for row in read_rows(run.output / "metrics.jsonl") if "eval_loss" in row}
    losses.pop(0)  # no checkpoint is written before the first step
    _, at = exported(run, tmp_path / "best", best=True)
    assert at == min(losses, key=losses.get) == 2, losses


def test_the_folder_holds_the_tokenizer_the_config_and_a_card_with_the_losses_until_then(run, tmp_path, tiny_model):
    exported(run, tmp_path / "out", step=4)
    for name in ("config.json", "tokenizer.json", "generation_config.json", "README.md"):
        assert (tmp_path / "out" / name).exists(), name
    card = (tmp_path / "out" / "README.md").read_text()
    assert "after 4 steps of `sft`" in card and "| 4 | " in card and "| 6 | " not in card
    ours, theirs = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "out", tiny_model))
    assert {k: v for k, v in ours.items() if k != "dtype"} == {k: v for k, v in theirs.items() if k != "dtype"}


def test_the_card_names_every_set_of_a_mixture(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    config = SFTConfig(model="m", data="here/a.jsonl*0.7, there/b.jsonl*0.3", output=tmp_path)
    assert "after 4 steps of `sft` on a.jsonl*0.7, b.jsonl*0.3\n" in final.model_card(config, "sft", 4)


def test_an_interrupted_run_gives_its_newest_whole_checkpoint(run, tmp_path):
    stopped = tmp_path / "stopped"
    shutil.copytree(run.output, stopped)
    shutil.rmtree(stopped / "final")
    newest = stopped / "checkpoints" / "6"
    newest.rename(newest.with_name("6.orbax-checkpoint-tmp"))  # killed while it was written
    export.main(ExportConfig(run=stopped, output=tmp_path / "out"))
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert same(found, exported(run, tmp_path / "four", step=4)[0])


def test_a_damaged_checkpoint_is_never_exported(run, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(run.output, broken)
    data = max((broken / "checkpoints" / "6" / "state" / "d").iterdir(), key=lambda f: f.stat().st_size)
    data.write_bytes(data.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"the checkpoint of step 6 in .* is damaged"):
        export.main(ExportConfig(run=broken, output=tmp_path / "six", step=6))
    export.main(ExportConfig(run=broken, output=tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "jaxalign.json").read_text())["trained_steps"] == 4
