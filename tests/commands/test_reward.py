"""`jaxalign reward`, end to end on a tiny model: it learns, resumes bit for bit, and transformers reads its scores."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxalign.cli.main import main
from jaxalign.commands import export, reward
from jaxalign.config.inference import ExportConfig
from jaxalign.config.offline import RewardAlgorithm, RewardConfig
from jaxalign.config.shared import LoraConfig, OptimizerConfig
from jaxalign.models.files import reward as files
from jaxalign.models.files.huggingface import load_tokenizer
from jaxalign.outside import Fields
from jaxalign.rollout.rewards.rewards import Rewards
from jaxalign.rollout.rewards.scorer import load_reward_model
from jaxalign.run.final import with_pad_token
from jaxalign.run.run import Run
from jaxalign.run.vocabulary import Vocabulary
from tests.commands.settings import OFFLINE
from tests.shared import on_one_device, rows


@pytest.fixture(scope="module")
def trained(tiny_model, pairs, tmp_path_factory):
    output = tmp_path_factory.mktemp("reward") / "run"
    config = RewardConfig(model=str(tiny_model), data=str(pairs), output=output, members=2, **OFFLINE)
    with on_one_device():
        assert reward.main(config) == 0
    return config


def test_pairs_that_differ_by_a_word_are_told_apart(trained):
    evaluations = {row["step"]: row for row in rows(trained.output) if "eval_loss" in row}
    assert evaluations[8]["eval_accuracy"] == 1.0 and evaluations[8]["eval_loss"] < evaluations[0]["eval_loss"]
    members = load_file(trained.output / "final" / "members" / "heads.safetensors")["heads"]
    assert members.shape == (2, 32) and np.abs(members[0] - members[1]).max() > 0.01


def test_a_run_that_goes_on_from_a_checkpoint_ends_bit_for_bit_the_same(trained, tmp_path, one_device):
    again = dataclasses.replace(trained, output=tmp_path / "again")
    shutil.copytree(trained.output, again.output)
    shutil.rmtree(again.output / "checkpoints" / "8")
    shutil.rmtree(again.output / "final")
    assert reward.main(again) == 0
    assert rows(again.output) == rows(trained.output)
    for name in ("model", "members/heads"):
        files = [load_file(run.output / "final" / f"{name}.safetensors") for run in (trained, again)]
        assert all(files[0][key].tobytes() == files[1][key].tobytes() for key in files[0])


@pytest.fixture(scope="module")
def scorer(trained):
    return load_reward_model(str(trained.output / "final"), batch_size=4)


PROMPTS, RESPONSES = ["one ?", "one ?", "one ?", "two ?"], ["cat the a", "dog", "", "dog red blue a the"]


def test_scores_of_texts_are_those_that_transformers_reads_at_the_terminator_of_padded_rows(trained, scorer):
    """Its logit is the mean of the members' scores, before they are normalised."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = trained.output / "final"
    theirs = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(theirs).__name__ == "LlamaForSequenceClassification"
    assert theirs.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    texts = [f"{prompt} {response} </s>" for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    with torch.no_grad():
        logits = theirs(**tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)).logits[:, 0]
    scale = json.loads((folder / "reward.json").read_text())
    ours = scorer.members(PROMPTS, RESPONSES) * np.array(scale["std"]) + np.array(scale["mean"])
    assert ours.shape == (4, 2) and np.ptp(ours.mean(axis=1)) > 0.1
    np.testing.assert_allclose(logits.numpy(), ours.mean(axis=1), atol=1e-4)


def sequences_of(batch):
    """The tokens of each response behind its prompt."""
    examples = batch.sequences
    planes = zip(*(x.reshape(-1, x.shape[-1]) for x in (examples.tokens, examples.segment_ids)), strict=True)
    return [tokens[ids == s] for tokens, ids in planes for s in range(1, ids.max() + 1)]


def test_scores_of_few_held_out_and_more_trained_responses_have_mean_0_and_variance_1(trained, scorer, one_device):
    """Two pairs are held out, too few alone. By way of text, and so of the loaded folder's own tokenizer."""
    data = reward.load_data(trained, Run.read(trained, "reward"))
    rows = [row for batch in (*data.held_out, *(data.batches[i] for i in range(6))) for row in sequences_of(batch)]
    assert len(sequences_of(data.held_out[0])) == 4 and len(rows) == 4 + 2 * 6 * 8
    scores = scorer.rows(rows)
    np.testing.assert_allclose(scores.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(scores.std(axis=0), 1, atol=1e-4)
    text = scorer.tokenizer.decode(rows[0], skip_special_tokens=True)
    prompt, _, response = text.partition("? ")
    np.testing.assert_allclose(scorer.members([f"{prompt}?"], [response])[0], scores[0], atol=1e-5)


def test_the_least_member_is_below_the_mean_and_a_cut_response_is_read_without_a_terminator(scorer):
    members = scorer.members(PROMPTS, RESPONSES)
    assert (members.min(axis=1) < members.mean(axis=1)).all()
    np.testing.assert_array_equal(scorer(PROMPTS, RESPONSES), members.mean(axis=1))
    least = dataclasses.replace(scorer, model=dataclasses.replace(scorer.model, rule="min"))
    np.testing.assert_array_equal(least(PROMPTS, RESPONSES), members.min(axis=1))
    with pytest.raises(ValueError, match="scores whole responses"):
        scorer.steps("one ?", ["cat"])
    assert scorer.ids("one ?", "cat").tolist() == [15, 21, 6, 2]
    assert scorer.ids("one ?", "cat", ended=False).tolist() == [15, 21, 6]
    with pytest.raises(ValueError, match="fills all 16 tokens"):
        scorer(["the " * 16], ["cat"])


def test_a_policy_is_rewarded_by_the_folder_with_the_scores_that_it_gives(trained, scorer):
    prompts, responses = ["one ?", "one ?"], ["cat the red", "dog a"]
    rewards = Rewards(f"0.5*reward_model(path={str(trained.output / 'final')!r})")
    expected = 0.5 * scorer(prompts, responses, finished=[True, False])
    np.testing.assert_allclose(rewards(prompts, responses, {"finished": [True, False]}), expected, atol=1e-6)
    with pytest.raises((ValueError, OSError), match="nowhere"):
        Rewards("reward_model(path='/nowhere')")


def test_a_prompt_that_a_reward_model_cannot_read_is_named_before_anything_is_drawn(trained):
    rewards = Rewards(f"reward_model(path={str(trained.output / 'final')!r})")
    most, more = "one " * 15, "one " * 16
    rewards.check(["one ?", most], {}, later=["finished"])
    assert rewards([most], ["cat"], {"finished": [True]}).shape == (1,)
    with pytest.raises(ValueError, match="2 of 3 prompts are too long: a prompt fills all 16 tokens"):
        rewards.check(["one ?", more, more], {}, later=["finished"])


def test_a_reward_model_is_held_once_by_those_who_check_it_and_those_who_ask_it(trained, tmp_path, monkeypatch):
    loads = []

    def load(path, **options):
        loads.append(path)
        return load_reward_model(path, **options)

    monkeypatch.setattr("jaxalign.rollout.rewards.functions.load_reward_model", load)
    folder = str(shutil.copytree(trained.output / "final", tmp_path / "unread"))
    Rewards(f"reward_model(path={folder!r})")(["one ?"], ["cat"], {"finished": [True]})
    assert loads == [folder]


def test_a_reward_model_in_few_bits_nearly_agrees_and_one_in_host_memory_agrees_to_the_bit(trained, scorer):
    folder = str(trained.output / "final")
    prompts = [f"{count} {word} ?" for count in ("one", "two") for word in ("cat", "dog", "red", "the")]
    responses = ["cat the a", "dog", "red dog blue", "dog red blue a the", "cat", "the the dog", "a", "blue cat"]
    expected = scorer.members(prompts, responses)
    away = load_reward_model(folder, batch_size=4, offload=True)
    assert {x.sharding.memory_kind for x in jax.tree.leaves(away.params)} == {"pinned_host"}
    np.testing.assert_array_equal(away.members(prompts, responses), expected)
    for kind, most in (("int8", 0.03), ("nf4", 0.3)):  # scores have a standard deviation of 1
        members = load_reward_model(folder, batch_size=4, quantise=kind, offload=True).members(prompts, responses)
        print(kind, np.abs(members - expected).max(), np.corrcoef(members.mean(axis=1), expected.mean(axis=1))[0, 1])
        assert 0 < np.abs(members - expected).max() < most
    with pytest.raises(ValueError, match="quantise='int4' is not one of none, int8, nf4"):
        Rewards(f"reward_model(path={folder!r}, quantise='int4')")


@pytest.mark.parametrize("quantise", ["none", "int8"])
def test_a_reward_model_spread_over_eight_devices_gives_the_scores_of_one(trained, quantise):
    folder = str(trained.output / "final")
    options = {"batch_size": 3, "quantise": quantise}
    spread = load_reward_model(folder, devices=jax.devices(), **options)
    kernel = jax.tree.leaves(spread.params["model"]["blocks"]["mlp"]["up"]["kernel"])[0]
    assert spread.batch_size == 8 and kernel.addressable_shards[0].data.size == kernel.size // 8
    alone = load_reward_model(folder, **options).members(PROMPTS, RESPONSES)
    np.testing.assert_allclose(spread.members(PROMPTS, RESPONSES), alone, atol=2e-5)


def test_a_reward_model_in_half_precision_is_half_as_large(trained, scorer):
    half = load_reward_model(str(trained.output / "final"), batch_size=4, dtype="bfloat16")
    halved, whole = (sum(x.nbytes for x in jax.tree.leaves(one.params["model"])) for one in (half, scorer))
    assert 2 * halved == whole
    np.testing.assert_allclose(half.members(PROMPTS, RESPONSES), scorer.members(PROMPTS, RESPONSES), atol=0.1)
    with pytest.raises(ValueError, match="dtype='float16' is not one of float32, bfloat16"):
        Rewards(f"reward_model(path={str(trained.output / 'final')!r}, dtype='float16')")


def test_a_vocabulary_with_nothing_but_an_eos_token_pads_with_its_last_word(tiny_model):
    tokenizer = load_tokenizer(str(tiny_model))
    tokenizer.bos_token = tokenizer.unk_token = None
    vocabulary, pad = with_pad_token(Vocabulary(tokenizer, (2,)))
    assert pad == vocabulary.pad_token_id == len(tokenizer) - 1 and tokenizer.pad_token_id == tokenizer.eos_token_id


def unreadable(*_):
    raise AssertionError("export reads no data")


def test_a_checkpoint_is_exported_as_the_folder_that_the_run_would_have_ended_in_without_its_data(
    trained, tmp_path, monkeypatch
):
    monkeypatch.setattr(reward, "load_data", unreadable)
    for step in (8, 4):
        assert export.main(ExportConfig(run=trained.output, output=tmp_path / str(step), step=step)) == 0
    folders = tmp_path / "8", tmp_path / "4", trained.output / "final"
    last, earlier, final = (folder / "members" / "heads.safetensors" for folder in folders)
    assert last.read_bytes() == final.read_bytes() != earlier.read_bytes()
    described = [json.loads((path.parents[1] / "reward.json").read_text()) for path in (last, final)]
    assert described[0] == described[1]
    with pytest.raises(ValueError, match="whose adapters go with its heads"):
        export.main(ExportConfig(run=trained.output, output=tmp_path / "adapter", adapter=True))


def test_a_checkpoint_of_an_older_version_is_normalised_on_the_same_data_or_refused(trained, tmp_path, monkeypatch):
    """It has no summary, so the data are read again; a loss of somebody's own is not imported for that."""
    whole = reward.Checkpoints.extras

    def without_summary(*arguments):
        extras = whole(*arguments)
        return Fields({name: value for name, value in extras.content.items() if name != "summary"}, extras.where)

    monkeypatch.setattr(reward.Checkpoints, "extras", without_summary)
    assert export.main(ExportConfig(run=trained.output, output=tmp_path / "same")) == 0
    described = [json.loads((f / "reward.json").read_text()) for f in (tmp_path / "same", trained.output / "final")]
    np.testing.assert_allclose(described[0]["mean"], described[1]["mean"], atol=1e-5)
    run, data = shutil.copytree(trained.output, tmp_path / "run"), tmp_path / "pairs.jsonl"
    recorded = json.loads((run / "config.json").read_text())
    (tmp_path / "stray.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')\ndef mine(scores): return scores\n")
    monkeypatch.syspath_prepend(tmp_path)

    def refused(**changes):
        (run / "config.json").write_text(json.dumps(recorded | {"config": recorded["config"] | changes}))
        with pytest.raises(ValueError) as error:
            export.main(ExportConfig(run=run, output=tmp_path / "out"))
        assert not (tmp_path / "out").exists() and not (tmp_path / "trace").exists()
        return str(error.value)

    assert "scores are normalised on `data`" in refused(data=str(data))
    data.write_text("".join(Path(trained.data).read_text().splitlines(keepends=True)[::-1]))
    assert "have changed since" in refused(data=str(data))
    own = refused(algorithm={"loss": "stray:mine"})
    assert "names the loss stray:mine, code of a user's own, which export does not run" in own


def test_a_run_goes_on_from_a_classifier_of_ours_or_of_others_head_and_bias_included(trained, pairs, tmp_path, capsys):
    """At a learning rate of 0 what comes out is what went in."""
    ours, other = trained.output / "final", tmp_path / "other"
    shutil.copytree(ours, other, ignore=shutil.ignore_patterns("members", "reward.json", "jaxalign.json"))
    tensors = load_file(other / "model.safetensors") | {"score.bias": np.array([0.75], np.float32)}
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    flags = ["--data", str(pairs), "--steps", "1", "--max-length", "16", "--remat", "none", "--mesh.fsdp", "1"]
    flags += ["--optimizer.learning-rate", "0", "--freeze-trunk"]
    for model, more in ((ours, ["--members", "2"]), (other, [])):
        output = tmp_path / f"from-{model.name}"
        with on_one_device():
            assert main(["reward", "--model", str(model), "--output", str(output), *flags, *more]) == 0
        before, after = (load_file(folder / "model.safetensors") for folder in (model, output / "final"))
        assert before.keys() == after.keys() and all(np.array_equal(before[name], after[name]) for name in before)
        architectures = json.loads((output / "final" / "config.json").read_text())["architectures"]
        assert architectures == ["LlamaForSequenceClassification"]
    evaluations = {row["step"]: row["eval_loss"] for row in rows(trained.output) if "eval_loss" in row}
    again = {row["step"]: row["eval_loss"] for row in rows(tmp_path / "from-final") if "eval_loss" in row}
    assert abs(again[0] - evaluations[8]) < 1e-5  # the loss goes on where it was
    mean = [
        json.loads((tmp_path / f"from-{n}" / "final" / "reward.json").read_text())["mean"] for n in ("final", "other")
    ]
    np.testing.assert_allclose(np.mean(mean[0]) + 0.75, mean[1], atol=1e-4)
    (loaded,) = load_reward_model(str(tmp_path / "from-other" / "final")).members(["one ?"], ["cat the a"])
    (plain,) = load_reward_model(str(other)).members(["one ?"], ["cat the a"])
    described = json.loads((tmp_path / "from-other" / "final" / "reward.json").read_text())
    np.testing.assert_allclose(loaded * described["std"] + described["mean"], plain, atol=1e-5)
    capsys.readouterr()
    for model, more, message in (
        (ours, [], "--members 1: "),
        (other, ["--members", "3"], "has 1 of them, and heads that start alike stay alike; give --members 1"),
    ):
        with on_one_device():
            assert main(["reward", "--model", str(model), "--output", str(tmp_path / "no"), *flags, *more]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_members_with_adapters_differ_and_are_read_with_their_base(
    trained, tiny_model, tmp_path, one_device, monkeypatch
):
    config = dataclasses.replace(trained, output=tmp_path / "run", lora=LoraConfig(rank=2), members=3, combine="min")
    assert reward.main(config) == 0
    evaluations = {row["step"]: row for row in rows(config.output) if "eval_loss" in row}
    assert evaluations[8]["eval_loss"] < evaluations[0]["eval_loss"] and evaluations[8]["eval_disagreement"] > 0
    folder = config.output / "final"
    model = load_reward_model(str(folder), batch_size=4)
    members = model.members(PROMPTS, RESPONSES)
    assert members.shape == (4, 3) and np.abs(members[:, 0] - members[:, 1]).max() > 0.01
    np.testing.assert_array_equal(model(PROMPTS, RESPONSES), members.min(axis=1))
    described = json.loads((folder / "reward.json").read_text())
    monkeypatch.setattr(files, "fingerprint", lambda base: "another")
    with pytest.raises(ValueError, match=f"has adapters on {tiny_model}, whose weights or config have changed"):
        load_reward_model(str(folder))
    one = tmp_path / "one"  # without what is besides, the folder is the first member's, merged
    shutil.copytree(folder, one, ignore=shutil.ignore_patterns("members", "reward.json"))
    first = load_reward_model(str(one), batch_size=4).members(PROMPTS, RESPONSES)[:, 0]
    np.testing.assert_allclose((first - described["mean"][0]) / described["std"][0], members[:, 0], atol=1e-4)


def test_a_frozen_trunk_stays_and_a_ranking_teaches_the_head_alone(trained, tiny_model, tmp_path, one_device):
    loss = RewardAlgorithm("kwise")
    config = dataclasses.replace(trained, output=tmp_path / "run", freeze_trunk=True, algorithm=loss)
    assert reward.main(config) == 0
    before, after = load_file(tiny_model / "model.safetensors"), load_file(config.output / "final/model.safetensors")
    assert before.keys() == after.keys() - {"score.weight"}
    assert all(np.array_equal(before[key], after[key]) for key in before)
    evaluations = {row["step"]: row for row in rows(config.output) if "eval_loss" in row}
    assert evaluations[8]["eval_loss"] < evaluations[0]["eval_loss"]
    checkpoint = sum(file.stat().st_size for file in (config.output / "checkpoints" / "8").rglob("*"))
    assert checkpoint < sum(x.nbytes for x in before.values())  # of heads and their moments, not of the trunk


def test_a_process_reward_model_tells_right_steps_from_wrong_ones(tiny_model, tmp_path, one_device):
    """A step is right if it begins with a cat; it is found out wherever it stands."""
    rng, solutions = np.random.default_rng(0), []
    for _ in range(48):
        labels = (rng.random(rng.integers(1, 4)) < 0.5).tolist()
        answers = [" ".join(["cat" if right else "dog", *rng.choice(["the", "a"], 1)]) for right in labels]
        solutions.append({"prompt": "one ?", "completions": answers, "labels": labels})
    path = tmp_path / "steps.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in solutions))
    more = OFFLINE | {
        "steps": 16,
        "packing": False,
        "eval_share": 0.25,
        "optimizer": OptimizerConfig(learning_rate=1e-2),
    }
    loss = RewardAlgorithm("process")
    config = RewardConfig(
        model=str(tiny_model), data=str(path), output=tmp_path / "run", algorithm=loss, step_separator=".", **more
    )
    assert reward.main(config) == 0
    evaluations = {row["step"]: row for row in rows(config.output) if "eval_loss" in row}
    assert evaluations[16]["eval_accuracy"] == 1.0 and evaluations[16]["eval_loss"] < evaluations[0]["eval_loss"]
    model = load_reward_model(str(config.output / "final"))
    steps = model.steps("one ?", ["cat the", "dog a", "cat a"])
    assert steps.shape == (3, 1) and (steps[:, 0] > 0).tolist() == [True, False, True]
    np.testing.assert_allclose(
        model.steps("one ?", ["cat the", "dog a"]), steps[:2], atol=1e-5
    )  # it sees no later step
    with pytest.raises(ValueError, match="17 tokens, and the model reads 16"):
        model.steps("one ?", ["cat the"] * 5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--algorithm.loss", "process"], "hold no steps; known are prompt+completions+labels"),
        (["--algorithm.loss", "graded_bradley_terry"], "needs a column margin in every pair"),
        (["--algorithm.loss", "rao_kupper"], "add it, or use --algorithm.loss bradley_terry"),
        (["--members", "2", "--combine", "median"], "unknown name 'median'"),
        (["--freeze-trunk", "--lora.rank", "2"], "give one of them"),
        (["--members", "0"], "--members 0: it must be at least 1"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(flags, message, tiny_model, pairs, tmp_path, capsys):
    common = ["--model", str(tiny_model), "--data", str(pairs), "--output", str(tmp_path / "run")]
    assert main(["reward", *common, "--mesh.fsdp", "8", *flags]) == 2
    log = capsys.readouterr().err
    assert message in log and "Traceback" not in log
    assert not (tmp_path / "run").exists()


def test_eval_data_that_lack_what_the_loss_asks_for_are_named_at_once(tiny_model, pairs, tmp_path, capsys):
    told = tmp_path / "told.jsonl"
    told.write_text(
        "".join(json.dumps(json.loads(line) | {"margin": 1.0}) + "\n" for line in pairs.read_text().splitlines())
    )
    flags = ["--model", str(tiny_model), "--data", str(told), "--output", str(tmp_path / "run")]
    more = ["--mesh.fsdp", "8", "--algorithm.loss", "graded_bradley_terry", "--eval-data", str(pairs)]
    assert main(["reward", *flags, *more]) == 2
    assert f"margin in every pair, and --eval-data {pairs} has none" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
