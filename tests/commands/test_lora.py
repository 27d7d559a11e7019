"""`jaxalign sft --lora.*`: a frozen base, adapters that are trained, resumed and exported, and nothing else."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from jaxalign.cli.main import parse
from jaxalign.commands import export, sft
from jaxalign.config.inference import ExportConfig
from jaxalign.config.offline import SFTConfig
from jaxalign.config.shared import BestCheckpointConfig, LoraConfig, MeshConfig, OptimizerConfig
from jaxalign.models import places
from jaxalign.models.adapters.lora import Lora, join, resolve_targets, split
from jaxalign.models.adapters.merge import merge
from jaxalign.models.decoder.decoder import make_decoder
from jaxalign.models.files.huggingface import read_config, read_hf_config
from jaxalign.models.files.load import load_params
from jaxalign.models.files.peft import load_adapter, save_adapter
from jaxalign.models.files.save import save_pretrained
from jaxalign.run import final
from jaxalign.run.run import Run
from jaxalign.run.vocabulary import load_vocabulary
from tests.rollout.answers import answers
from tests.shared import on_one_device, rows

TOKENS = np.arange(24).reshape(2, 12)


def config_of(tiny_model, tiny_data, output, **changes):
    config = SFTConfig(
        model=str(tiny_model),
        data=str(tiny_data),
        output=output,
        steps=4,
        batch_size=16,
        max_length=48,
        remat="none",
        samples=1,
        lora=LoraConfig(rank=4, alpha=8.0, dora=True, quantise="nf4"),
        mesh=MeshConfig(data=1, fsdp=1),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        checkpoint=BestCheckpointConfig(every=2),
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def qlora(tiny_model, tiny_data, tmp_path_factory):
    """The finished folder of a QDoRA run, and its config."""
    output = tmp_path_factory.mktemp("lora") / "run"
    config = config_of(tiny_model, tiny_data, output)
    with on_one_device():
        assert sft.main(config) == 0
    return output, config


def files(output):
    return {
        name: (output / name).read_bytes() for name in ("final/model.safetensors", "adapter/adapter_model.safetensors")
    }


def hidden(params, config, **options):
    graphdef, _ = make_decoder(config, **options)
    return jax.jit(lambda params: nnx.merge(graphdef, params)(TOKENS))(params)


def test_the_adapters_learn_and_the_merged_model_is_base_and_adapters(qlora, tiny_model):
    output, _ = qlora
    losses = [row["eval_loss"] for row in rows(output) if "eval_loss" in row]
    assert losses[-1] < losses[0] - 0.3
    config = read_config(str(tiny_model))
    lora, adapter = load_adapter(output / "adapter", config)
    assert lora == Lora(4, 8.0, resolve_targets("all-linear", config), dora=True)
    base = load_params(str(tiny_model), config, quantise="nf4")
    merged = load_params(str(output / "final"), config)
    np.testing.assert_allclose(
        hidden(join(jax.tree.map(jnp.asarray, adapter), base), config, lora=lora, quantise="nf4"),
        hidden(merged, config),
        atol=1e-5,
    )
    np.testing.assert_array_equal(merged["embed"]["embedding"], base["embed"]["embedding"])


def test_checkpoints_hold_the_adapters_and_never_the_base(qlora):
    extras = (qlora[0] / "checkpoints" / "4" / "extras" / "metadata").read_text()
    assert "params.blocks.mlp.up.adapter.magnitude" in extras and "kernel" not in extras and "embed" not in extras


def test_an_interrupted_lora_run_ends_bit_for_bit_like_one_that_was_not(qlora, tmp_path, one_device, capfd):
    """As if it had been stopped after the checkpoint of step 2."""
    output, config = qlora
    again = dataclasses.replace(config, output=tmp_path / "run")
    shutil.copytree(output, again.output)
    for name in ("final", "adapter", "checkpoints/4"):
        shutil.rmtree(again.output / name)
    assert sft.main(again) == 0
    assert "continuing after step 2 of 4" in capfd.readouterr().err
    assert files(again.output) == files(output) and rows(again.output) == rows(output)
    assert (again.output / "samples.jsonl").read_text() == (output / "samples.jsonl").read_text()


def test_export_merges_or_writes_the_adapter(qlora, tmp_path):
    output, _ = qlora
    assert export.main(ExportConfig(run=output, output=tmp_path / "merged")) == 0
    assert export.main(ExportConfig(run=output, output=tmp_path / "adapter", adapter=True)) == 0
    expected, tensors = (
        load_file(output / "final" / "model.safetensors"),
        load_file(tmp_path / "merged/model.safetensors"),
    )
    assert expected.keys() == tensors.keys()
    for name, x in expected.items():
        np.testing.assert_allclose(tensors[name], x, atol=1e-6, err_msg=name)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "adapter" / name).read_bytes() == (output / "adapter" / name).read_bytes()


def test_an_adapter_names_its_base_so_that_it_is_found_from_any_folder(tiny_model, tmp_path, monkeypatch):
    model = read_config(str(tiny_model))
    lora = Lora(2, 4.0, resolve_targets("query", model))
    _, abstract = split(make_decoder(model, lora=lora)[1])
    adapter = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)
    monkeypatch.chdir(tiny_model.parent)
    config = config_of(tiny_model.name, "", "")
    run = Run(config, "sft", places.make_mesh(), model, load_vocabulary(config, model), lora, exists=False)
    final.save_lora(tmp_path / "a", run, adapter, step=1)
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tiny_model.resolve())


def test_a_base_with_its_adapter_answers_as_the_merged_model(tiny_model, tmp_path):
    config = read_config(str(tiny_model))
    lora = Lora(4, 8.0, resolve_targets("all-linear", config))
    _, abstract = split(make_decoder(config, lora=lora)[1])
    adapter = jax.tree.map(lambda x: np.random.default_rng(x.size).normal(0, 0.3, x.shape).astype(x.dtype), abstract)
    save_adapter(tmp_path / "adapter", adapter, lora, config)
    shutil.copytree(tiny_model, tmp_path / "merged")
    merged = merge(join(jax.device_put(adapter), load_params(str(tiny_model), config)), lora)
    save_pretrained(tmp_path / "weights", merged, config, read_hf_config(str(tiny_model)))
    shutil.copy(tmp_path / "weights" / "model.safetensors", tmp_path / "merged")
    prompts, greedy = ["the cat sees", "a dog ?"], {"max_new_tokens": 8, "temperature": 0.0}
    texts = answers(tiny_model, prompts, adapter=tmp_path / "adapter", **greedy)
    assert texts == answers(tmp_path / "merged", prompts, **greedy)
    assert texts != answers(tiny_model, prompts, **greedy)


@pytest.mark.parametrize(
    "settings, message",
    [
        (LoraConfig(rank=4, targets="q_proj,nothing"), r"target 'nothing' names no linear layer; LlamaForCausalLM has"),
        (LoraConfig(rank=-1), "`lora.rank` -1: it must be at least 0"),
        (LoraConfig(rank=4, alpha=0.0), "`lora.alpha` 0.0: it must be above 0"),
        (LoraConfig(quantise="nf4"), "`lora.quantise` 'nf4' has no effect with `lora.rank` 0; leave it out"),
    ],
)
def test_what_cannot_be_adapted_is_told_before_device_work(
    settings, message, tiny_model, tiny_data, tmp_path, one_device
):
    with pytest.raises(ValueError, match=message):
        sft.main(config_of(tiny_model, tiny_data, tmp_path / "run", lora=settings))


def test_the_command_line_speaks_of_lora(tmp_path):
    flags = [
        "--model",
        "m",
        "--data",
        "d",
        "--output",
        str(tmp_path),
        "--lora.rank",
        "8",
        "--lora.targets",
        "q_proj,v_proj",
    ]
    _, config = parse(["sft", *flags, "--lora.quantise", "nf4", "--lora.rslora"])
    assert config.lora == LoraConfig(rank=8, targets="q_proj,v_proj", quantise="nf4", rslora=True)
