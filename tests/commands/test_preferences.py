"""`jaxalign dpo` and `kto`, end to end on a tiny model: they learn, resume bit for bit, and tell mistakes at once."""

import dataclasses
import functools
import json
import shutil
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxalign.cli.main import main
from jaxalign.commands import dpo, kto
from jaxalign.config.offline import DPOAlgorithm, DPOConfig, KTOAlgorithm, KTOConfig
from jaxalign.config.shared import BestCheckpointConfig, LoraConfig, MeshConfig, RefUpdateConfig
from jaxalign.run import reference_logps
from tests.commands.settings import OFFLINE
from tests.observed import observe
from tests.shared import final, on_one_device, rows


@pytest.fixture(scope="module")
def trained(tiny_model, pairs, tmp_path_factory):
    """A function of a command's name: config and command of a run that is made once."""
    commands = {"dpo": (DPOConfig, dpo.main), "kto": (KTOConfig, kto.main)}

    @functools.cache
    def train(name):
        kind, run = commands[name]
        output = tmp_path_factory.mktemp(name) / "run"
        config = kind(model=str(tiny_model), data=str(pairs), output=output, samples=1, **OFFLINE)
        with on_one_device():
            assert run(config) == 0
        return config, run

    return train


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_held_out_loss_falls_and_rewards_part(trained, name):
    config, _ = trained(name)
    steps = rows(config.output)
    evaluations = {row["step"]: row for row in steps if "eval_loss" in row}
    assert evaluations[0]["eval_loss"] == pytest.approx({"dpo": np.log(2), "kto": 0.5}[name], abs=1e-5)
    assert evaluations[8]["eval_loss"] < evaluations[0]["eval_loss"] - 0.02
    last = evaluations[8]
    assert last["eval_rewards/chosen"] > 0 > last["eval_rewards/rejected"]
    if name == "dpo":
        assert last["eval_rewards/accuracies"] > 0.9
    assert "tags: [jaxalign, " + name in (config.output / "final" / "README.md").read_text()


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_a_run_that_goes_on_from_a_checkpoint_ends_bit_for_bit_the_same(trained, name, tmp_path, one_device):
    config, run = trained(name)
    again = dataclasses.replace(config, output=tmp_path / "again")
    shutil.copytree(config.output, again.output)
    shutil.rmtree(again.output / "checkpoints" / "8")
    shutil.rmtree(again.output / "final")
    assert run(again) == 0
    assert rows(again.output) == rows(config.output)
    expected, tensors = final(config.output), final(again.output)
    assert all(expected[key].tobytes() == tensors[key].tobytes() for key in expected)


def test_running_means_and_a_reference_that_moves_go_on_from_a_checkpoint_bit_for_bit(trained, tmp_path, one_device):
    config, run = trained("dpo")
    more = {"steps": 4, "checkpoint": BestCheckpointConfig(every=2), "ref_update": RefUpdateConfig(every=1, alpha=0.5)}
    config = dataclasses.replace(config, algorithm=DPOAlgorithm("bco_pair + beta_dpo(alpha=5.0)"), **more)
    outputs = [tmp_path / "whole", tmp_path / "resumed"]
    assert run(dataclasses.replace(config, output=outputs[0])) == 0
    shutil.copytree(*outputs)
    shutil.rmtree(outputs[1] / "checkpoints" / "4")
    shutil.rmtree(outputs[1] / "final")
    assert run(dataclasses.replace(config, output=outputs[1])) == 0
    assert rows(outputs[0]) == rows(outputs[1])
    expected, tensors = map(final, outputs)
    assert all(expected[key].tobytes() == tensors[key].tobytes() for key in expected)


def test_a_reference_that_was_run_once_before_changes_nothing(trained, tmp_path, one_device, caplog):
    config, run = trained("kto")
    other = dataclasses.replace(config, output=tmp_path / "run", precompute_reference=True)
    assert run(other) == 0
    for a, b in zip(rows(other.output), rows(config.output), strict=True):
        assert a["step"] == b["step"] and a.get("loss", 0) == pytest.approx(b.get("loss", 0), abs=1e-5)
    tensors, expected = final(other.output), final(config.output)
    for key in expected:
        np.testing.assert_allclose(tensors[key], expected[key], atol=1e-5)
    files = sorted((other.output / "reference").glob("*.npz"))
    assert len(files) == 4  # training and held-out sets, each with its mismatched responses
    before = [file.stat().st_mtime_ns for file in files]
    shutil.rmtree(other.output / "final")
    assert run(other) == 0
    assert [file.stat().st_mtime_ns for file in files] == before


@pytest.mark.parametrize("left", [0, 4, 100])
def test_log_probabilities_whose_file_was_cut_short_are_computed_again(left, tmp_path):
    path, key = tmp_path / "reference" / "logps.npz", {"model": 1}
    reference_logps.write(path, key, np.ones((2, 2), np.float32))
    assert reference_logps.read(path, key, (2, 2)).tolist() == [[1, 1], [1, 1]]
    path.write_bytes(path.read_bytes()[:left])
    assert reference_logps.read(path, key, (2, 2)) is None


MESHES = [("dpo", []), ("dpo", ["--precompute-reference", "--share-prompt"]), ("kto", [])]


@pytest.mark.parametrize(("name", "more"), MESHES, ids=str)
def test_on_a_mesh_of_two_by_two_by_two_the_command_gives_the_model_of_one_device(name, more, trained, tmp_path):
    config, _ = trained(name)
    flags = ["--model", config.model, "--data", config.data, "--output", str(tmp_path / "run")]
    flags += ["--steps", "8", "--batch-size", "8", "--max-length", "16", "--remat", "none", "--samples", "1"]
    flags += ["--optimizer.learning-rate", "2e-3", "--checkpoint.every", "4"]
    assert main([name, *flags, "--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2", *more]) == 0
    for a, b in zip(rows(tmp_path / "run"), rows(config.output), strict=True):
        for key in ("loss", "eval_loss", "grad_norm"):
            assert a.get(key, 0) == pytest.approx(b.get(key, 0), abs=1e-5)
    tensors, expected = final(tmp_path / "run"), final(config.output)
    for key in expected:
        np.testing.assert_allclose(tensors[key], expected[key], atol=1e-5)


def test_with_lora_the_base_is_the_reference_and_the_adapter_alone_is_trained(
    trained,
    tiny_model,
    tmp_path,
    one_device,
):
    config, run = trained("dpo")
    config = dataclasses.replace(config, output=tmp_path / "run", lora=LoraConfig(rank=4), steps=2)
    assert run(config) == 0
    assert rows(config.output)[1]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert (config.output / "adapter" / "adapter_model.safetensors").exists()
    base, merged = load_file(tiny_model / "model.safetensors"), final(config.output)
    assert np.array_equal(base["model.norm.weight"], merged["model.norm.weight"])
    assert not np.array_equal(base["model.layers.0.mlp.up_proj.weight"], merged["model.layers.0.mlp.up_proj.weight"])


def test_a_loss_of_the_users_own_file_runs(trained, tmp_path, one_device, monkeypatch):
    (tmp_path / "my_losses.py").write_text(
        "import jax.numpy as jnp\n\n"
        "def slic(policy_chosen_logps, policy_rejected_logps, *, delta=1.0):\n"
        "    return jnp.maximum(0.0, delta - policy_chosen_logps + policy_rejected_logps)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config, run = trained("dpo")
    algorithm = DPOAlgorithm("my_losses:slic(delta=1.0)")
    config = dataclasses.replace(config, output=tmp_path / "run", algorithm=algorithm, steps=2)
    assert run(config) == 0
    assert rows(config.output)[1]["loss"] > 0


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired", "bco"])
def test_responses_of_one_class_train_with_a_warning(loss, tiny_model, tmp_path, monkeypatch, caplog):
    path = tmp_path / "rated.jsonl"
    rows = [{"prompt": f"{word} ?", "completion": "cat", "label": True} for word in ("one", "two", "red", "blue")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * 3))
    settings = OFFLINE | {"mesh": MeshConfig(), "algorithm": KTOAlgorithm(loss)}
    config = KTOConfig(model=str(tiny_model), data=str(path), output=tmp_path / "run", **settings)
    assert observe(config, monkeypatch).mistake is None
    assert "all responses are desirable: without undesirable ones nothing holds the policy back" in caplog.text


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("dpo", ["--algorithm.loss", "dpoo"], "unknown name 'dpoo' (did you mean 'dpo'?); known are aot, aot_unpaired"),
        ("dpo", ["--algorithm.loss", "ipo(betta=1)"], "ipo has no keyword 'betta' (did you mean 'beta'?); it takes"),
        ("dpo", ["--algorithm.loss", "dpo(beta=-1)"], "dpo: beta=-1 must be above 0"),
        ("dpo", ["--algorithm.loss", "dpo(label_smoothing=5)"], "label_smoothing=5 must be at least 0 and at most 0.5"),
        ("dpo", ["--algorithm.loss", "ipo(beta='text')"], "ipo: beta='text' must be a number"),
        ("dpo", ["--algorithm.loss", "dpo + 0*sft"], "sft has the weight 0, which must be above 0"),
        ("kto", ["--algorithm.loss", "kto(lambda_d=[1])"], "kto: lambda_d=[1] must be a number"),
        (
            "dpo",
            ["--algorithm.loss", "ld_dpo", "--precompute-reference"],
            "--precompute-reference stores the reference's log-probabilities of whole responses, and the loss 'ld_dpo'",
        ),
        ("dpo", ["--algorithm.loss", "simpo", "--precompute-reference"], "the loss 'simpo' uses no reference"),
        ("kto", ["--algorithm.loss", "dpo"], "unknown name 'dpo'"),
        ("kto", ["--batch-size", "1"], "--batch-size 1: KTO's KL is a mean over the batch; give 2 or more"),
        ("dpo", ["--ref-model", "x", "--algorithm.loss", "simpo"], "the loss 'simpo' uses no reference"),
        ("dpo", ["--ref-update.every", "2", "--algorithm.loss", "simpo"], "the loss 'simpo' uses no reference"),
        (
            "dpo",
            ["--ref-update.every", "2", "--precompute-reference"],
            "stores log-probabilities of a fixed one; drop one of the two",
        ),
        ("kto", ["--ref-update.every", "2", "--lora.rank", "4"], "with LoRA the reference is the base, which adapters"),
        ("dpo", ["--ref-update.every", "2", "--ref-update.alpha", "2"], "--ref-update.alpha 2.0: it must be at most 1"),
        ("dpo", ["--share-prompt", "--attention", "splash"], "the splash kernel cannot keep the two apart"),
        ("dpo", ["--share-prompt", "--no-packing"], "it needs --packing"),
        ("dpo", ["--data", "{tiny_data}"], "hold no feedback; known are messages+label"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    command, flags, message, tiny_model, tiny_data, pairs, tmp_path, capsys
):
    start = time.perf_counter()
    common = ["--model", str(tiny_model), "--data", str(pairs), "--output", str(tmp_path / "run")]
    flags = [flag.format(tiny_data=tiny_data) for flag in flags]
    assert main([command, *common, "--mesh.fsdp", "8", *flags]) == 2
    log = capsys.readouterr().err
    assert message in log and "Traceback" not in log
    assert not (tmp_path / "run").exists() and time.perf_counter() - start < 60
