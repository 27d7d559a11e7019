"""On-policy runs at their edges: a server that draws, a mesh, full windows, policies that never end, or at once."""

import dataclasses
import json
import re
import shutil
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxalign.cli.main import main
from jaxalign.commands import generate, grpo
from jaxalign.config.inference import GenerateConfig
from jaxalign.config.on_policy import GRPOConfig
from jaxalign.config.shared import LoraConfig
from jaxalign.models.decoder.decoder import make_decoder
from jaxalign.models.files import huggingface
from jaxalign.models.files.load import load_params
from jaxalign.rollout.engine.agreement import Agreement
from jaxalign.rollout.engine.engine import LocalEngine, Request
from jaxalign.rollout.engine.http import EngineError
from jaxalign.rollout.engine.slots import Sampling
from tests.commands.settings import ON_POLICY
from tests.shared import final, on_one_device, rows, run_on_hosts

STEPS = 3
WINDOW, NEW = ON_POLICY["max_length"], ON_POLICY["max_new_tokens"]
# what of a row follows from the tokens that were drawn
OF_TOKENS = "length", "score", "ended", "score_std", "same_scores", "num_tokens"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Twelve prompts, half of which leave room for a response and for no token more."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    texts = [f"{count} {which} ?" for count in ("one", "one cat sees two runs to") for which in ("cat", "dog")]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts * 3))
    return path


def config_of(model, prompts, output, **changes):
    return GRPOConfig(model=str(model), data=str(prompts), output=output, **ON_POLICY | {"steps": STEPS} | changes)


@pytest.fixture(scope="module")
def local(tiny_model, prompts, tmp_path_factory):
    """A run on one device."""
    output = tmp_path_factory.mktemp("local") / "run"
    with on_one_device():
        assert grpo.main(config_of(tiny_model, prompts, output)) == 0
    return output


def same_step(actual, expected, **tolerance):
    """The reward's own name aside, and what the other run says besides."""
    expected = {name: value for name, value in expected.items() if not name.startswith("scores/")}
    assert {name: actual[name] for name in expected} == pytest.approx(expected, **tolerance)


@pytest.mark.usefixtures("one_device")
def test_a_run_through_a_server_is_the_run_without_one(local, tiny_model, prompts, tmp_path, server):
    """The weights do arrive: else the second step's tokens were the first policy's."""
    config = config_of(tiny_model, prompts, tmp_path / "run", engine=server.url)
    assert grpo.main(config) == 0
    steps, expected = rows(config.output), rows(local)
    same_step(steps[0], expected[0], abs=1e-6)
    for ours, theirs in zip(steps, expected, strict=True):
        assert [ours[name] for name in OF_TOKENS] == [theirs[name] for name in OF_TOKENS]
        assert ours["ratio"] == pytest.approx(1.0, abs=1e-5)
    assert server.seen.count("/collective_rpc") == server.seen.count("/reset_prefix_cache") == STEPS
    assert server.folder == config.output / "policy"


def flags_of(model, prompts, output, **more):
    flags = {
        "model": model,
        "data": prompts,
        "output": output,
        "reward": ON_POLICY["reward"],
        "batch-size": ON_POLICY["batch_size"],
        "n": ON_POLICY["n"],
        "slots": ON_POLICY["slots"],
        "max-length": WINDOW,
        "max-new-tokens": NEW,
        "remat": "none",
        "optimizer.learning-rate": 1e-2,
        "optimizer.schedule": "constant",
        **more,
    }
    return ["grpo", *(part for name, value in flags.items() for part in (f"--{name}", str(value)))]


def test_a_mesh_of_eight_devices_takes_the_step_of_one(local, tiny_model, prompts, tmp_path):
    axes = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
    assert main(flags_of(tiny_model, prompts, tmp_path / "run", steps=1, **axes)) == 0
    same_step(rows(tmp_path / "run")[0], rows(local)[0], abs=1e-4)


def test_two_hosts_generate_and_learn_together_what_one_does(local, tiny_model, prompts, tmp_path):
    """Two processes of two devices each. The reward is asked on the first alone, and its failure ends both."""
    flags = flags_of(tiny_model, prompts, tmp_path / "run", steps=3, samples=2)
    # fails_later is ON_POLICY's reward until the third step
    flags += ["--distributed", "--reward", "tests.commands.rewards:fails_later"]
    statuses, _, errors = run_on_hosts([sys.executable, "-m", "jaxalign.cli.main", *flags])
    assert statuses == [2, 3], errors
    assert "the judge has gone home" in errors[0]
    line = r"host 0 \(.+\) has failed: the reward fails_later raised RuntimeError: the judge has gone home"
    assert re.search(line, errors[1]), errors
    steps, expected = rows(tmp_path / "run"), rows(local)[:2]
    same_step(steps[0], expected[0], abs=1e-4)
    assert [row["ratio"] for row in steps] == pytest.approx([1.0, 1.0], abs=1e-4)
    samples = [(run / "samples.jsonl").read_text().splitlines()[:2] for run in (tmp_path / "run", local)]
    assert samples[0] == samples[1]
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir()


def test_a_run_on_policy_is_exported_as_any_other(local, tmp_path):
    assert main(["export", "--run", str(local), "--output", str(tmp_path / "out")]) == 0
    tensors, expected = load_file(tmp_path / "out" / "model.safetensors"), final(local)
    assert tensors.keys() == expected.keys() and all(np.array_equal(tensors[k], expected[k]) for k in tensors)
    assert f"after {STEPS} steps of `grpo`" in (tmp_path / "out" / "README.md").read_text()


def with_terminator_at(tiny_model, folder, level):
    """The tiny model with a first hidden dimension that is large everywhere, and `level` in the terminator's embedding.

    Tied embeddings: all logits but the terminator's hold the same large part, so its own is far above or below.
    """
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][:, 0] = 10.0
    weights["model.embed_tokens.weight"][2, 0] = level
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.usefixtures("one_device")
def test_a_policy_that_never_ends_fills_its_window_and_pays_for_it(tiny_model, tmp_path):
    model = with_terminator_at(tiny_model, tmp_path / "model", -10.0)
    full = tmp_path / "full.jsonl"
    full.write_text(json.dumps({"prompt": "one cat sees two dog runs to ?"}) + "\n")
    tokenizer = huggingface.load_tokenizer(str(model))
    assert len(tokenizer("one cat sees two dog runs to ?")["input_ids"]) == WINDOW - NEW
    config = config_of(model, full, tmp_path / "run", steps=1, batch_size=1, missing_end_penalty=0.5)
    assert grpo.main(config) == 0
    [row] = rows(config.output)
    assert (row["ended"], row["length"], row["num_tokens"]) == (0.0, NEW, config.n * WINDOW)
    [sample] = [json.loads(line) for line in (config.output / "samples.jsonl").read_text().splitlines()]
    words = sample["response"].split()
    assert sample["score"] == pytest.approx(words.count("dog") / len(words) - 0.5)


@pytest.mark.usefixtures("one_device")
def test_responses_that_all_end_at_once_teach_nothing_and_break_nothing(tiny_model, prompts, tmp_path):
    model = with_terminator_at(tiny_model, tmp_path / "model", 30.0)
    config = config_of(model, prompts, tmp_path / "run", steps=1)
    assert grpo.main(config) == 0
    [row] = rows(config.output)
    assert (row["ended"], row["length"], row["score"], row["same_scores"]) == (1.0, 1.0, 0.0, 1.0)
    assert row["loss"] == row["grad_norm"] == 0.0 and row["ratio"] == pytest.approx(1.0)
    for name, tensor in load_file(model / "model.safetensors").items():
        np.testing.assert_array_equal(final(config.output)[name], tensor)


@pytest.mark.usefixtures("one_device")
def test_adapters_are_merged_for_a_server(tiny_model, prompts, tmp_path, server):
    config = config_of(tiny_model, prompts, tmp_path / "run", steps=2, lora=LoraConfig(rank=2), engine=server.url)
    assert grpo.main(config) == 0
    steps = rows(config.output)
    assert [row["ratio"] for row in steps] == pytest.approx([1.0, 1.0], abs=1e-4)
    assert steps[1]["kl_k3"] > 1e-5  # there is something to merge
    params = load_params(str(config.output / "policy"), server.config)
    before = load_params(str(tiny_model), server.config)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), params, before)
    assert max(jax.tree.leaves(moved["blocks"])) > 1e-4 and moved["embed"]["embedding"] == 0


def test_generate_asks_a_server_for_the_answers(tiny_model, tmp_path, server):
    settings = GenerateConfig(str(tiny_model), "the cat sees", max_new_tokens=8, n=4, batch_size=8)
    outputs = []
    for name, engine in (("here", None), ("there", server.url)):
        config = dataclasses.replace(settings, output=tmp_path / name, engine=engine)
        assert generate.main(config) == 0
        outputs.append([json.loads(line) for line in config.output.read_text().splitlines()])
    assert outputs[0] == outputs[1] and len({row["response"] for row in outputs[0]}) > 1
    with pytest.raises(ValueError, match="`adapter` adapter would be loaded here, and `engine` responds elsewhere"):
        generate.main(dataclasses.replace(settings, engine=server.url, adapter="adapter"))


@pytest.fixture(scope="module")
def drawn(tiny_model):
    """(params, graphdef, requests, responses at temperature 0.5)."""
    config = huggingface.read_config(str(tiny_model))
    graphdef, params = make_decoder(config)[0], load_params(str(tiny_model), config)
    requests = [Request((1, 4, 6), seed) for seed in range(8)]
    sampling = Sampling(8, 0.5, terminators=(2,))
    return (
        params,
        graphdef,
        requests,
        LocalEngine(graphdef).generate(params, requests, KEY, sampling=sampling),
        sampling,
    )


KEY = jax.random.key(0)


def test_log_probs_of_another_policy_or_temperature_are_refused(drawn):
    params, graphdef, requests, responses, sampling = drawn
    agree = Agreement(graphdef, rows=8, max_length=16)
    agree(params, requests, responses, sampling)
    raw = [response._replace(logps=response.model_logps) for response in responses]
    with pytest.raises(EngineError, match=r"are those of the model itself .*`temperature` 0.5 .*processed_logprobs"):
        agree(params, requests, raw, sampling)
    trained = jax.tree.map(lambda x: 1.5 * x, params)
    with pytest.raises(EngineError, match=r"differ by .* it has not loaded the policy that was published"):
        agree(trained, requests, responses, sampling)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--engine", "localhost"], "engine 'localhost' is no address of a server"),
        (["--engine", "http://127.0.0.1:9"], "http://127.0.0.1:9/v1/models cannot be reached"),
        (["--max-length", "80"], "the server at URL has room for 64 tokens of prompt and response"),
        (["--engine-reload", "load"], "'load' is no path"),
    ],
)
def test_mistakes_are_one_line_before_device_work(flags, message, tiny_model, prompts, tmp_path, server, capsys):
    common = ["--model", str(tiny_model), "--data", str(prompts), "--output", str(tmp_path / "run")]
    common += ["--reward", "tests.commands.rewards:dogs", "--max-length", "16", "--max-new-tokens", "8"]
    common += ["--batch-size", "4", "--mesh.fsdp", "8", "--engine", server.url]
    assert main(["grpo", *common, *flags]) == 2
    log = capsys.readouterr().err
    assert message.replace("URL", server.url) in log and "Traceback" not in log and not (tmp_path / "run").exists()


@pytest.mark.usefixtures("one_device")
def test_a_server_that_is_lost_leaves_a_checkpoint_to_go_on_from(tiny_model, prompts, tmp_path, server):
    config = config_of(tiny_model, prompts, tmp_path / "run", engine=server.url, seed=1)
    server.edit = lambda answer: answer if server.seen.count("/collective_rpc") < 3 else {}
    with pytest.raises(EngineError, match="'choices' is absent; it must hold a list"):
        grpo.main(config)
    assert [row["step"] for row in rows(config.output)] == [1, 2]
    server.edit = lambda answer: answer
    assert grpo.main(config) == 0  # it goes on
    assert [row["step"] for row in rows(config.output)] == [1, 2, 3]
