"""Report of a mistake to its user: one line on stderr, exit status 2, no traceback, and no run folder left behind."""

import functools
import gzip
import json
import os
import resource
import shutil
import subprocess
import sys

import pytest

from jaxalign.cli.main import main
from jaxalign.config.limits import to_json
from jaxalign.config.offline import SFTConfig

ROW = {"prompt": "the cat ?", "completion": "the dog ."}
LOSSES = """
def wrong(logps, targets):
    return -logps

def mean(logps, log_normalizer, mean_logit):
    return -logps.mean()

def nothing(logps):
    return -logps * float("nan")
"""


def lines(rows):
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


@pytest.fixture(scope="module")
def world(tiny_model, tmp_path_factory):
    """A folder of good and of broken models and data."""
    folder = tmp_path_factory.mktemp("bad")
    _write_models(folder, tiny_model)
    files = {
        "rows.jsonl": lines([ROW] * 20),
        "line7.jsonl": lines([*[ROW] * 6, '{"prompt": "the cat', ROW]),
        "row7.jsonl": lines([*[ROW] * 6, {"prompt": "the cat"}, ROW]),
        "columns.jsonl": lines([{"foo": "a", "bar": "b"}]),
        "empty.jsonl": "",
        "silent.jsonl": lines([ROW, {**ROW, "completion": " "}]),
        "long.jsonl": lines([{**ROW, "prompt": "the cat " * 50}]),
        "messages.jsonl": lines([{"messages": [{"role": "user", "content": "a"}]}]),
        "digits.jsonl": lines([ROW, '{"prompt": "a", "completion": "b", "n": %s}' % ("1" * 5000)]),
        "deep.jsonl": lines([ROW, "[" * 100_000]),
        "context.jsonl": lines([ROW, {**ROW, "context": "red"}]),
        "images.jsonl": lines([{**ROW, "\x1b[2J": 1}, {**ROW, "images": ["a.png"]}]),
        "margin.jsonl": lines([{"prompt": "a", "chosen": "b", "rejected": "c", "margin": 10**400}]),
        "scores.jsonl": lines([{"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 1e308}]),
        "no.parquet": "no",
        "bad_losses.py": LOSSES,
        "broken_losses.py": "def f(:",
        "config.json": '{"command": "sft", "config": {"mod',
        "template.jinja": "{% for m in messages %}{{ m.content ",
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    whole = gzip.compress(files["rows.jsonl"].encode())
    (folder / "cut.jsonl.gz").write_bytes(whole[:-9])
    described = to_json(SFTConfig(model="m", data="d", output=folder / "run")) | {"steps": "many"}
    (folder / "types.json").write_text(json.dumps({"command": "sft", "config": described}))
    (folder / "generate.json").write_text(json.dumps({"command": "generate", "config": {}}))
    (folder / "folder").mkdir()
    (folder / "folder" / "checkpoints").mkdir()
    (folder / "a_run").mkdir()
    (folder / "a_run" / "config.json").write_text(json.dumps({"command": "sft", "config": described | {"steps": 2}}))
    return folder


def _write_models(folder, tiny_model):
    hf = json.loads((tiny_model / "config.json").read_text())
    changes = {
        "model": {},
        "mamba": {"architectures": ["MambaForCausalLM"]},
        "wider": {"intermediate_size": 64},
        "deeper": {"num_hidden_layers": 3},
        "three_heads": {"num_key_value_heads": 3},
        "few_words": {"vocab_size": 20},
        "words": {"hidden_size": "32"},
        "truncated": {},
        "bin": {},
        "no_tokenizer": {},
        "sharded": {},
    }
    for name, changed in changes.items():
        shutil.copytree(tiny_model, folder / name)
        (folder / name / "config.json").write_text(json.dumps(hf | changed))
    weights = folder / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (folder / "bin" / "model.safetensors").rename(folder / "bin" / "pytorch_model.bin")
    (folder / "no_tokenizer" / "tokenizer.json").unlink()
    index = {"weight_map": {"x": "model.safetensors", "y": "model-2.safetensors"}}
    (folder / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "piped").mkdir()
    os.mkfifo(folder / "piped" / "tokenizer.json")
    (folder / "gpt2").mkdir()
    shape = {"vocab_size": 32, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 32}
    (folder / "gpt2" / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"], **shape}))
    for file in tiny_model.glob("tokenizer*"):
        shutil.copy(file, folder / "gpt2")


# flags of `jaxalign sft` besides --model model --data rows.jsonl --output run -> what the message says, in order
SFT = {
    "--lr 1": ["Unrecognized options: --lr", "jaxalign sft --help"],
    "--learning-rate 1": ["Unrecognized options", "Perhaps you meant: --optimizer.learning-rate"],
    "--batch-size many": ["--batch-size", "'many'"],
    "--optimizer.schedule cosin": ["'cosin'", "--optimizer.schedule", "'constant', 'linear', 'cosine'"],
    "--steps 0": ["--steps 0: it must be at least 1"],
    "--steps -3": ["--steps -3: it must be at least 1"],
    "--epochs nan": ["--epochs nan: it must be above 0"],
    "--batch-size 0": ["--batch-size 0: it must be at least 1"],
    "--microbatches 0": ["--microbatches 0: it must be at least 1"],
    "--microbatches 3": ["--batch-size 8 is not a multiple of", "--microbatches (3)", "the nearest"],
    "--batch-size 12": ["--batch-size 12 is not a multiple of", "--mesh.fsdp (8)", "the nearest: 8 or 16"],
    "--mesh.data 3": ["--mesh.data 3 x --mesh.fsdp -1 x --mesh.tensor 1 does not fill 8 devices"],
    "--max-length 1": ["--max-length 1: it must be at least 2"],
    "--eval-share 1": ["--eval-share 1.0: it must be at least 0 and below 1"],
    "--seed -1": ["--seed -1: it must be at least 0"],
    "--optimizer.learning-rate -1": ["--optimizer.learning-rate -1.0: it must be at least 0"],
    "--optimizer.warmup-steps 2": ["--optimizer.warmup-steps 2: it must be below 2"],
    "--checkpoint.keep-best 1 --eval-share 0": ["--checkpoint.keep-best 1 needs held-out data; give --eval-data"],
    "--attention cudnn": ["--attention cudnn runs on GPU, not on CPU; auto"],
    "--loss cross_entrpy": ["'cross_entrpy' (did you mean 'cross_entropy'?)", "package.module:function"],
    "--loss cross_entropy(smoothing=1)": ["no keyword 'smoothing'", "it takes label_smoothing, z_loss"],
    "--loss nowhere:mine": ["cannot import 'nowhere'", "PYTHONPATH"],
    "--loss broken_losses:f": ["cannot import 'broken_losses' (SyntaxError: ", "JAXALIGN_TRACEBACK=1"],
    "--loss bad_losses:mine": ["bad_losses has no function 'mine'", "it has mean, nothing, wrong"],
    "--loss bad_losses:wrong": ["wrong has an unknown input 'targets'", "logps, log_normalizer, mean_logit, entropy"],
    "--loss bad_losses:mean": ["returned float32[] for logps float32[5, 7]", "it must return float32[5, 7]"],
    "--lora.alpha 8": ["--lora.alpha 8.0 has no effect with --lora.rank 0"],
    "--epochs=2": ["--epochs 2.0 has no effect with --steps 2; leave it out, or change --steps"],
    "--profile": ["--profile traces steps 3 to 5, after compilation, and the run has 2"],
    "--eval-every 1 --eval-share 0": ["--eval-every 1 has no effect without held-out data; give --eval-data"],
    "--samples 2 --eval-share 0": ["--samples 2 has no effect without held-out data"],
    "--output W/\udcff": ["--output W/\\udcff is not UTF-8 text"],
    "--tokenizer W/piped": ["W/piped/tokenizer.json is not a regular file"],
    "--chat-template W/piped/tokenizer.json": ["W/piped/tokenizer.json is not a regular file"],
    "--from-config W/piped/tokenizer.json": ["--from-config: W/piped/tokenizer.json is not a regular file"],
    "--model W/nothing": ["W/nothing: no such folder", "hub name"],
    "--model org/nothing": ["'org/nothing' is no local folder and could not be fetched", "Check the spelling"],
    "--model W/mamba": ["architecture MambaForCausalLM is not supported; supported are LlamaForCausalLM"],
    "--model W/wider": ["mlp.gate_proj.weight has shape [48, 32], config.json implies [64, 32]"],
    "--model W/deeper": ["tensor model.layers.2", "is missing"],
    "--model W/three_heads": ["4 attention heads for 3 key heads"],
    "--model W/words": ["W/words: config.json: 'hidden_size' is 32; it must be a whole number"],
    "--model W/few_words": ["model.embed_tokens.weight has shape [32, 32], config.json implies [20, 32]"],
    "--model config:W/few_words": ["token '?' is number 21 of the tokenizer of", "and the model has embeddings for 20"],
    "--model W/truncated": ["model.safetensors (", "is truncated or damaged", "fetch it again"],
    "--model W/sharded": ["lists model-2.safetensors, which is not there; fetch it again"],
    "--model W/bin": ["holds pytorch_model.bin but no *.safetensors", "can run code", "save_pretrained"],
    "--model W/no_tokenizer": ["has no tokenizer (tokenizer.json); name one with --tokenizer"],
    "--model config:W/gpt2 --max-length 33": ["--max-length 33", "has 32 learned positions"],
    "--data W/row.jsonl": ["data file W/row.jsonl does not exist", "rows.jsonl"],
    "--data org/nothing": ["'org/nothing' is no local file and could not be fetched from the hub"],
    "--data W/empty.jsonl": ["data file W/empty.jsonl is empty"],
    "--data W/line7.jsonl": ["line 7: not JSON", "the cat"],
    "--data W/row7.jsonl": ["row 7: 'completion' is missing", "prompt+completion"],
    "--data W/columns.jsonl": ["columns bar, foo are no known format; known are messages"],
    "--data W/silent.jsonl": ["1 of 2 rows", "empty response (first: W/silent.jsonl, row 2)", "--max-dropped"],
    "--data W/long.jsonl": ["1 of 1 rows", "the prompt fills the window", "raise --max-length (32)"],
    "--data W/messages.jsonl": ["the tokenizer has no chat template", "--chat-template (plain, alpaca, "],
    "--data W/digits.jsonl": ["W/digits.jsonl, line 2: a number has more than 4300 digits"],
    "--data W/deep.jsonl": ["W/deep.jsonl, line 2: lists or objects are nested too deeply"],
    "--data W/context.jsonl": ["W/context.jsonl, row 2: column 'context' holds red, which", "'prompt' or 'completion'"],
    "--data W/images.jsonl": [
        "row 2: column 'images' holds ['a.png'], which the format prompt+completion does not read"
    ],
    "--data /dev/zero": ["data /dev/zero is not a regular file"],
    "--data W/no.parquet": ["cannot be read as .parquet"],
    "--data W/cut.jsonl.gz": ["W/cut.jsonl.gz is not readable", "is it whole"],
    "--data W/rows.jsonl*x,W/rows.jsonl": ["'x' is not a weight; write name*0.5"],
    "--data W/rows.jsonl*inf,W/rows.jsonl*1": ["weight inf must be positive and finite"],
    "--data W/rows.jsonl:test": ["has no split 'test'"],
    "--eval-data W/none.jsonl": ["data file W/none.jsonl does not exist"],
    "--chat-template chatlm": ["'chatlm' is neither a file nor one of plain, alpaca, chatml, llama3"],
    "--chat-template chatml": ["needs the tokens <|im_end|>, <|im_start|>", "'plain' and 'alpaca' need none"],
    "--output W/rows.jsonl": ["--output W/rows.jsonl is a file; name a folder"],
    "--output W/rows.jsonl/run": ["W/rows.jsonl is a file, so nothing can be made in it"],
    "--output W/folder": ["W/folder holds checkpoints of a run, and no config.json that describes it"],
    "--output /proc/run": ["--output /proc/run", "name another"],
}

OTHERS = {
    "stf": ["unknown command 'stf' (did you mean 'sft'?); there are sft, dpo, kto, reward, ppo, grpo"],
    "sft --model W/model": ["Missing from jaxalign sft: --data STR --output PATH"],
    "sft --from-config": ["--from-config needs a file"],
    "sft --from-config W/none.json": ["--from-config: W/none.json cannot be read: No such file"],
    "sft --from-config W/config.json": ["--from-config: W/config.json is not JSON", "char 30", "fetch it again"],
    "sft --from-config W/types.json": ["W/types.json: steps is 'many', and must be int | None"],
    "sft --from-config W/generate.json": ["is of jaxalign generate, not of jaxalign sft"],
    "generate --model config:W/model --prompts x": ["random weights, which answer nothing"],
    "generate --model W/model --prompts W/none.jsonl": ["data file W/none.jsonl does not exist"],
    "generate --model W/model --prompts W/columns.jsonl": [
        "columns bar, foo hold no prompt; known are prompt (prompts in 'prompt'); messages"
    ],
    "generate --model W/model --prompts promts.jsonl": ["data file promts.jsonl does not exist"],
    "generate --model W/model --prompts W/promts": ["--prompts W/promts has no blank", "and there is no such file"],
    "dpo --model W/model --data W/margin.jsonl --output W/out": ["margin.jsonl, row 1: margin is beyond 1e30"],
    "reward --model W/model --data W/scores.jsonl --output W/out": ["row 1: score_chosen is 1e+308, not a finite"],
    "generate --model W/model --prompts W/messages.jsonl": ["the tokenizer has no chat template"],
    "generate --model W/model --prompts ": ["prompt 1 has no tokens"],
    "generate --model W/model --prompts x --top-p 0": ["--top-p 0.0: it must be above 0 and at most 1"],
    "generate --model W/model --prompts x --stop . ": ["--stop is empty; give it a value, or leave it out"],
    "generate --model W/model --prompts x --output W/folder": ["W/folder is a folder; name a .jsonl file"],
    "generate --model W/gpt2 --prompts W/long.jsonl": ["has 100 tokens", "more than the 32 positions of W/gpt2"],
    "export --run W/none --output W/out": ["W/none is not a run folder"],
    "export --run W/a_run --output W/out --step 1 --best": ["--best and --step 1 name two checkpoints"],
    "export --run W/a_run --output W/rows.jsonl": ["--output W/rows.jsonl is a file"],
    "quickstart --output W/rows.jsonl": ["--output W/rows.jsonl is a file"],
}


def told(arguments, capsys):
    """The one line that a command ends with; its exit status is 2."""
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    *_, last = err.splitlines()
    assert last.startswith("jaxalign: error: "), err
    return last


def said_in_order(message, parts):
    at = 0
    for part in parts:
        assert part in message[at:], f"{part!r} is not in {message[at:]!r}"
        at = message.index(part, at) + len(part)


@pytest.mark.parametrize("flags", SFT)
def test_a_bad_run_is_refused_in_one_line_and_makes_no_folder(flags, world, tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(world)
    base = {"--model": "W/model", "--data": "W/rows.jsonl", "--output": str(tmp_path / "run")}
    base |= {"--max-length": "32", "--steps": "2"}
    words = flags.split(" ")
    base = {flag: value for flag, value in base.items() if flag not in words}
    arguments = ["sft", *(part for pair in base.items() for part in pair), *words]
    if "--epochs" in words:
        arguments.remove("--steps"), arguments.remove("2")
    message = told([part.replace("W/", f"{world}/") for part in arguments], capsys)
    said_in_order(message.replace(f"{world}/", "W/"), SFT[flags])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", OTHERS)
def test_a_bad_command_is_refused_in_one_line(words, world, capsys):
    message = told([part.replace("W/", f"{world}/") for part in words.split(" ")], capsys)
    said_in_order(message.replace(f"{world}/", "W/"), OTHERS[words])


def test_a_template_that_is_not_jinja_is_told_with_its_line(world, tmp_path, capsys):
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "the cat"}]
    (tmp_path / "talk.jsonl").write_text(lines([{"messages": talk}]))
    arguments = ["sft", "--model", str(world / "model"), "--data", str(tmp_path / "talk.jsonl")]
    arguments += ["--output", str(tmp_path / "run"), "--chat-template", str(world / "template.jinja")]
    said_in_order(
        told(arguments, capsys), ["talk.jsonl, row 1: the chat template cannot render", "it is not Jinja, line 1: "]
    )


@pytest.fixture
def started(world, tmp_path, one_device):
    """Arguments of a run of two steps on one device, into tmp_path/run."""
    arguments = ["sft", "--model", str(world / "model"), "--data", str(world / "rows.jsonl"), "--max-length", "32"]
    return [*arguments, "--output", str(tmp_path / "run"), "--steps", "2", "--eval-share", "0", "--remat", "none"]


def test_a_finished_run_refuses_other_settings_fewer_steps_and_checkpoints_that_are_not_there(
    started, tmp_path, capsys
):
    run, export = str(tmp_path / "run"), ["export", "--run", str(tmp_path / "run"), "--output", str(tmp_path / "out")]
    assert main(started) == 0
    assert "holds another run: seed was 0, now 1" in told([*started, "--seed", "1"], capsys)
    assert f"{run} has trained 2 steps already, more than the 1 asked for" in told([*started, "--steps", "1"], capsys)
    assert "--resume is off; name another folder" in told([*started, "--no-resume"], capsys)
    assert "no checkpoint of step 0; those kept are 2" in told([*export, "--step", "0"], capsys)
    assert "kept no checkpoint with a held-out loss" in told([*export, "--best"], capsys)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert "has no checkpoint yet; run its command again" in told(export, capsys)


def test_a_loss_that_is_not_finite_names_no_checkpoint_where_there_is_none(started, capsys, world, monkeypatch):
    monkeypatch.syspath_prepend(world)
    message = told([*started, "--steps", "5", "--algorithm.loss", "bad_losses:nothing"], capsys)
    assert "steps 1 to 3 had a loss or gradient that is not finite" in message
    assert message.endswith("there is no earlier checkpoint")


def test_a_disk_that_fills_up_while_a_checkpoint_is_written_leaves_the_earlier_one_good(started, tmp_path):
    # the system lets no file grow beyond a limit, as a full disk would not: the write fails in Orbax's own threads
    assert main(started) == 0
    full = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (16_384, 16_384))
    run = [sys.executable, "-m", "jaxalign.cli.main", *started, "--steps", "4", "--optimizer.extend", "stretch"]
    environment = os.environ | {"XLA_FLAGS": "", "JAX_ENABLE_COMPILATION_CACHE": "0"}
    done = subprocess.run(run, preexec_fn=full, env=environment, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    message = done.stderr.splitlines()[-1]
    assert f"a checkpoint could not be written to {tmp_path / 'run' / 'checkpoints'}" in message
    assert "File too large" in message and "the last good checkpoint is of step 2" in message


def test_a_disk_with_too_little_space_is_noticed_before_a_checkpoint_is_begun(started, capsys, monkeypatch):
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=1000))
    message = told(started, capsys)
    assert "a checkpoint needs 0.2 MiB and " in message and "has 0.0 MiB left; free some space" in message
    assert "there is no earlier checkpoint" in message
