"""`jaxalign export`: which checkpoint of a run becomes a folder, and that the folder is that checkpoint."""

import dataclasses
import errno
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxalign import hosts
from jaxalign.cli.main import main
from jaxalign.commands import export, sft
from jaxalign.config.inference import ExportConfig
from jaxalign.config.offline import SFTConfig
from jaxalign.config.shared import BestCheckpointConfig, LoraConfig, MeshConfig, OptimizerConfig
from jaxalign.mistake import Mistake
from jaxalign.models.files.huggingface import read_config, read_hf_config
from jaxalign.models.files.load import load_params
from jaxalign.models.files.save import save_pretrained
from jaxalign.run import final
from jaxalign.run.run import Run
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


def recorded_as(run, to, **changes):
    """A copy of the run whose config.json says something else; None takes a name out."""
    folder = shutil.copytree(run.output, to)
    described = json.loads((folder / "config.json").read_text())
    settings = {name: value for name, value in changes.items() if name != "folder"}
    described["config"] |= settings
    if "folder" in changes:
        described["folder"] = changes["folder"]
    (folder / "config.json").write_text(json.dumps({n: v for n, v in described.items() if v is not None}))
    return folder


def export_of(folder, output, *flags):
    return main(["export", "--run", str(folder), "--output", str(output), *flags])


def test_a_relative_path_is_that_of_the_folder_in_which_the_run_began(run, tiny_model, tmp_path, monkeypatch, capsys):
    expected = load_file(run.output / "final" / "model.safetensors")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    began = recorded_as(run, tmp_path / "began", model=f"./{tiny_model.name}", folder=str(tiny_model.parent))
    assert export_of(began, tmp_path / "out") == 0
    assert same(load_file(tmp_path / "out" / "model.safetensors"), expected)
    shutil.copytree(tiny_model, tmp_path / "project" / "models" / "base")  # of a version that recorded no folder
    older = recorded_as(run, tmp_path / "project" / "runs" / "a", model="models/base", output="runs/a", folder=None)
    assert export_of(older, "out") == 0
    assert same(load_file(elsewhere / "out" / "model.safetensors"), expected)
    lost = recorded_as(run, tmp_path / "lost", model="models/base", folder=str(tmp_path))
    capsys.readouterr()
    assert export_of(lost, tmp_path / "no") == 2
    error = capsys.readouterr().err
    assert f"model models/base of {lost} is not in {tmp_path}, from where the run named it, nor on the hub" in error


def test_the_dtype_is_that_of_the_base_or_as_asked(run, tiny_model, tmp_path, capsys):
    half = shutil.copytree(tiny_model, tmp_path / "half")
    tensors = load_file(half / "model.safetensors")
    bfloat16 = {name: x.astype(ml_dtypes.bfloat16) for name, x in tensors.items()}
    save_file(bfloat16, half / "model.safetensors", metadata={"format": "pt"})
    of_half = recorded_as(run, tmp_path / "of-half", model=str(half))
    final = load_file(run.output / "final" / "model.safetensors")
    for number, (folder, flags, dtype) in enumerate(
        [
            (run.output, [], "float32"),
            (of_half, [], "bfloat16"),
            (of_half, ["--export-dtype", "float16"], "float16"),
            (recorded_as(run, tmp_path / "asked", model=str(half), export_dtype="float32"), [], "float32"),
        ]
    ):
        output = tmp_path / str(number)
        assert export_of(folder, output, *flags) == 0
        parameters = load_file(output / "model.safetensors")
        assert all(np.array_equal(x, final[name].astype(dtype)) and x.dtype == dtype for name, x in parameters.items())
        assert json.loads((output / "config.json").read_text())["dtype"] == dtype
        assert f"The weights are {dtype}." in (output / "README.md").read_text()
    assert export_of(run.output, tmp_path / "no", "--adapter", "--export-dtype", "float16") == 2
    assert "adapters are float32 always" in capsys.readouterr().err


def test_a_full_disk_at_the_end_is_one_line_and_leaves_nothing_half_done(run, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("jaxalign.models.files.save.write_file", full)
        assert export_of(run.output, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'out'} cannot be written (" in error and "make room there" in error
    assert "Traceback" not in error and not list(tmp_path.iterdir())
    assert export_of(run.output, tmp_path / "out") == 0


def test_a_run_is_claimed_with_the_weights_it_began_with_or_not_at_all(
    run, tiny_model, tmp_path, one_device, monkeypatch, capsys
):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    config = dataclasses.replace(run, model=str(model), output=tmp_path / "run", lora=LoraConfig(rank=2))

    def claim():
        opened = Run.open(config, "sft")
        return opened.claim(sft.load_data(config, opened))

    agreed = {}
    monkeypatch.setattr(hosts, "agree", agreed.update)
    assert claim() and claim()
    assert f"`model` {model}" in agreed  # hosts with other files are told apart by the folder's name
    tensors = load_file(model / "model.safetensors")
    scaled = {name: (x * 1.05).astype(np.float32) for name, x in tensors.items()}
    save_file(scaled, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Mistake, match=rf"config of `model` {model} have changed since .*run was started"):
        claim()
    (config.output / "checkpoints").mkdir()
    assert export_of(config.output, tmp_path / "out") == 2  # adapters would be merged into other weights
    assert f"config of model {model} have changed since" in capsys.readouterr().err
    described = json.loads((config.output / "config.json").read_text())
    (config.output / "config.json").write_text(json.dumps({k: v for k, v in described.items() if k != "weights"}))
    assert claim()  # a run of a version that recorded none


def test_a_number_beyond_float16_is_named_and_not_written_as_infinity(tiny_model, tmp_path):
    config = read_config(str(tiny_model))
    params = jax.tree.map(lambda x: x * 1e6, load_params(str(tiny_model), config))
    with pytest.raises(Mistake, match=r"tensor model\..* holds .*, and float16 ends at 65504; give `export_dtype`"):
        save_pretrained(tmp_path / "out", params, config, read_hf_config(str(tiny_model)), dtype="float16")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_run_gives_its_newest_whole_checkpoint(run, tmp_path):
    stopped = tmp_path / "stopped"
    shutil.copytree(run.output, stopped)
    shutil.rmtree(stopped / "final")
    newest = stopped / "checkpoints" / "6"
    newest.rename(newest.with_name("6.orbax-checkpoint-tmp"))  # killed while it was written
    export.main(ExportConfig(run=stopped, output=tmp_path / "out"))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert same(tensors, exported(run, tmp_path / "four", step=4)[0])


def test_a_damaged_checkpoint_is_never_exported(run, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(run.output, broken)
    data = max((broken / "checkpoints" / "6" / "state" / "d").iterdir(), key=lambda f: f.stat().st_size)
    data.write_bytes(data.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"the checkpoint of step 6 in .* is damaged"):
        export.main(ExportConfig(run=broken, output=tmp_path / "six", step=6))
    export.main(ExportConfig(run=broken, output=tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "jaxalign.json").read_text())["trained_steps"] == 4
