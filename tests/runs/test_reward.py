"""`jaxalign reward`, end to end on a tiny model: it learns, resumes bit for bit, and transformers reads its scores."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxalign.cli.main import main
from jaxalign.runs import reward
from jaxalign.runs.config import LoraConfig, RewardAlgorithm, RewardConfig
from tests.runs.test_preferences import SHARED, pairs, rows  # noqa: F401  a fixture
from tests.runs.test_sft import one_device  # noqa: F401  a fixture


@pytest.fixture(scope="module")
def trained(tiny_model, pairs, tmp_path_factory):  # noqa: F811
    import jax

    from jaxalign.training import sharding

    whole = sharding.make_mesh
    output = tmp_path_factory.mktemp("reward") / "run"
    config = RewardConfig(model=str(tiny_model), data=str(pairs), output=output, members=2, **SHARED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda **sizes: whole(**sizes, devices=jax.devices()[:1]))
        assert reward.run(config) == 0
    return config


def test_pairs_that_differ_by_a_word_are_told_apart(trained):
    held = {row["step"]: row for row in rows(trained.output) if "eval_loss" in row}
    assert held[8]["eval_accuracy"] == 1.0 and held[8]["eval_loss"] < held[0]["eval_loss"]
    members = load_file(trained.output / "final" / "members.safetensors")["members"]
    assert members.shape == (2, 32) and np.abs(members[0] - members[1]).max() > 0.01


def test_a_run_that_goes_on_from_a_checkpoint_ends_bit_for_bit_the_same(trained, tmp_path, one_device):  # noqa: F811
    again = dataclasses.replace(trained, output=tmp_path / "again")
    shutil.copytree(trained.output, again.output)
    shutil.rmtree(again.output / "checkpoints" / "8")
    shutil.rmtree(again.output / "final")
    assert reward.run(again) == 0
    assert rows(again.output) == rows(trained.output)
    for name in ("model", "members"):
        files = [load_file(run.output / "final" / f"{name}.safetensors") for run in (trained, again)]
        assert all(files[0][key].tobytes() == files[1][key].tobytes() for key in files[0])


def test_transformers_reads_the_score_at_the_terminator_of_padded_rows(trained):
    """Against our trunk and head, at the last token of each text, its eos included."""
    torch = pytest.importorskip("torch")
    import jax
    from flax import nnx
    from transformers import AutoModelForSequenceClassification

    from jaxalign.models import heads, huggingface
    from jaxalign.models.decoder import make_decoder
    from jaxalign.models.load import load_params

    folder = trained.output / "final"
    theirs = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert type(theirs).__name__ == "LlamaForSequenceClassification" and theirs.config.pad_token_id not in (None, 2)
    texts = [[1, 4, 6, 2], [1, 4, 7, 8, 9, 2], [1, 5, 2]]
    ids = np.full((3, 6), theirs.config.pad_token_id)
    mask = (np.arange(6) < np.array([[len(text)] for text in texts])).astype(np.int64)  # of lengths: pad may be bos
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = text
    with torch.no_grad():
        found = theirs(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits[:, 0]
    config = huggingface.read_config(trained.model)
    graphdef, like = make_decoder(config)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    copy = trained.output.parent / "trunk"
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    shutil.copy(f"{trained.model}/config.json", copy)
    (copy / "members.safetensors").unlink()
    from safetensors.numpy import save_file

    tensors = load_file(folder / "model.safetensors")
    score = tensors.pop("score.weight")
    save_file(tensors, copy / "model.safetensors")
    params = load_params(str(copy), config, shardings=jax.tree.map(lambda _: place, like))
    model = nnx.merge(graphdef, params)
    ours = [float(heads.scores(model(np.array([t], np.int32)), score)[0, -1, 0]) for t in texts]
    np.testing.assert_allclose(found.numpy(), ours, atol=1e-4)
    described = json.loads((folder / "reward.json").read_text())
    assert described["std"] > 0 and described["rule"] == "mean"


def test_adapters_and_a_loss_of_rankings_end_in_the_same_kind_of_folder(trained, tmp_path, one_device):  # noqa: F811
    loss = RewardAlgorithm("kwise")
    config = dataclasses.replace(trained, output=tmp_path / "run", lora=LoraConfig(rank=2), steps=2, algorithm=loss)
    assert reward.run(config) == 0
    shapes = lambda run: {k: v.shape for k, v in load_file(run.output / "final" / "model.safetensors").items()}  # noqa: E731
    assert shapes(config) == shapes(trained)
    assert json.loads((config.output / "final" / "reward.json").read_text())["std"] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--algorithm.loss", "process"], "asks for an input 'step_scores'"),
        (["--algorithm.loss", "graded_bradley_terry"], "the data have no margins"),
        (["--members", "0"], "--members 0: it must be at least 1"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(flags, message, tiny_model, pairs, tmp_path, capsys):  # noqa: F811
    given = ["--model", str(tiny_model), "--data", str(pairs), "--output", str(tmp_path / "run")]
    assert main(["reward", *given, "--mesh.fsdp", "8", *flags]) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert not (tmp_path / "run").exists()
