"""`jaxalign sft` as a user runs it: from a folder and a file to a folder, interrupted in every way on the way."""

import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxalign.commands import sft
from jaxalign.config.offline import SFTConfig
from jaxalign.config.shared import BestCheckpointConfig, MeshConfig, OptimizerConfig
from tests.shared import final, on_one_device, rows

STEPS = 60


def config_of(tiny_model, tiny_data, output, **changes):
    config = SFTConfig(
        model=str(tiny_model),
        data=str(tiny_data),
        output=output,
        steps=8,
        batch_size=16,
        max_length=48,
        remat="none",
        samples=2,
        mesh=MeshConfig(data=1, fsdp=1),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        checkpoint=BestCheckpointConfig(every=4),
    )
    return dataclasses.replace(config, **changes)


def test_a_run_lowers_the_held_out_loss_and_leaves_a_folder_that_transformers_loads(
    tiny_model, tiny_data, tmp_path, one_device
):
    output = tmp_path / "run"
    assert sft.main(config_of(tiny_model, tiny_data, output, steps=40, eval_every=20)) == 0
    held = {row["step"]: row["eval_loss"] for row in rows(output) if "eval_loss" in row}
    assert list(held) == [0, 20, 40] and held[40] < held[20] < held[0]
    assert [row["step"] for row in rows(output)] == list(range(41))
    samples = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [0, 0, 20, 20, 40, 40]
    described = json.loads((output / "config.json").read_text())
    assert described["config"]["steps"] == 40 and "jax" in described["versions"]
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(output / "final")
    assert AutoTokenizer.from_pretrained(output / "final").eos_token == "</s>"
    answer = model.generate(torch.tensor([[1, 4, 6]]), max_new_tokens=3, do_sample=False, pad_token_id=2)
    assert answer.shape[1] > 3


def test_a_finished_run_says_so_and_other_settings_are_refused(tiny_model, tiny_data, tmp_path, one_device):
    config = config_of(tiny_model, tiny_data, tmp_path / "run", steps=2, eval_data=str(tiny_data))
    assert sft.main(config) == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert sft.main(config) == 0
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    with pytest.raises(ValueError, match="holds another run: seed was 0, now 1"):
        sft.main(dataclasses.replace(config, seed=1))
    older = json.loads((tmp_path / "run" / "config.json").read_text())
    del older["config"]["lora"], older["config"]["turns"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(older))
    assert sft.main(config) == 0  # a run of before these settings is the same run
    with pytest.raises(ValueError, match="holds a run already and `resume` is off"):
        sft.main(dataclasses.replace(config, resume=False))


def test_more_steps_continue_a_finished_run_and_keep_its_old_result(tiny_model, tiny_data, tmp_path, one_device):
    config = config_of(tiny_model, tiny_data, tmp_path / "run", steps=2)
    sft.main(config)
    more = dataclasses.replace(config, steps=3)
    with pytest.raises(ValueError, match=r"`steps` 3: .* was planned for 2, and the cosine learning rate depends on"):
        sft.main(more)
    restarted = dataclasses.replace(more, optimizer=OptimizerConfig(learning_rate=3e-3, extend="restart"))
    assert sft.main(restarted) == 0
    assert [row["step"] for row in rows(tmp_path / "run")] == [0, 1, 2, 3]
    rates = [row["learning_rate"] for row in rows(tmp_path / "run")[1:]]
    assert rates == pytest.approx([3e-3, 1.5e-3, 3e-3], rel=1e-6)  # of float32
    assert (tmp_path / "run" / "final-2").is_dir()
    assert sft.main(more) == 0  # the checkpoint has the schedule


def test_held_out_data_that_have_changed_are_refused(tiny_model, tiny_data, tmp_path, one_device):
    held = tmp_path / "held.jsonl"
    held.write_text('{"text": "the cat sees a dog"}\n')
    constant = OptimizerConfig(learning_rate=3e-3, schedule="constant")
    config = config_of(tiny_model, tiny_data, tmp_path / "run", steps=1, eval_data=str(held), optimizer=constant)
    assert sft.main(config) == 0
    held.write_text('{"text": "the dog sees a cat"}\n')
    with pytest.raises(ValueError, match=r"the held-out data of .*held.jsonl have changed since"):
        sft.main(dataclasses.replace(config, steps=2))


def command(tiny_model, tiny_data, output, *more):
    flags = ["--steps", STEPS, "--batch-size", 16, "--max-length", 48, "--eval-every", 20, "--checkpoint.every", 7]
    flags += ["--optimizer.learning-rate", 3e-3, "--remat", "none", *more]
    run = [sys.executable, "-m", "jaxalign.cli.main", "sft", "--model", tiny_model, "--data", tiny_data]
    return [str(part) for part in [*run, "--output", output, *flags]]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Runs of their own process, on one device, that share compiled programs."""
    cache = tmp_path_factory.mktemp("compiled")
    options = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_COMPILATION_CACHE_DIR": str(cache)}
    return os.environ | options | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


@pytest.fixture(scope="module", params=["--packing", "--no-packing"])
def whole_run(request, tiny_model, tiny_data, tmp_path_factory, environment):
    output = tmp_path_factory.mktemp("whole") / "run"
    subprocess.run(command(tiny_model, tiny_data, output, request.param, "--profile"), env=environment, check=True)
    return request.param, output


def test_profile_writes_a_trace(whole_run):
    # in a process of its own: the profiler crashes in one that has loaded libtpu without a TPU
    assert list((whole_run[1] / "profile").rglob("*.xplane.pb"))


def interrupt(run, environment, output, number, after):
    """Starts the run, sends the signal when metrics.jsonl has `after` rows, and returns the exit status and stderr."""
    with subprocess.Popen(run, env=environment, stderr=subprocess.PIPE, text=True) as process:
        path = output / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while (not path.exists() or path.read_text().count("\n") < after) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(number)
        said = process.communicate()[1]
    return process.returncode, said


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_interrupted_run_ends_bit_for_bit_like_one_that_was_not(
    whole_run, tiny_model, tiny_data, tmp_path, environment, number
):
    packing, whole = whole_run
    run = command(tiny_model, tiny_data, tmp_path / "run", packing)
    after = random.Random().randint(3, STEPS - 20)
    status, said = interrupt(run, environment, tmp_path / "run", number, after)
    if number == signal.SIGTERM:
        assert status == 128 + signal.SIGTERM and "the same command continues" in said
    else:
        assert status == -signal.SIGKILL
    kept = any(folder.name.isdigit() for folder in (tmp_path / "run" / "checkpoints").glob("*"))
    done = subprocess.run(run, env=environment, check=True, capture_output=True, text=True)
    assert ("continuing after step" in done.stderr) == kept, done.stderr
    assert rows(tmp_path / "run") == rows(whole), f"killed after {after} rows"
    expected, found = final(whole), final(tmp_path / "run")
    assert all(expected[name].tobytes() == found[name].tobytes() for name in expected)
    assert (tmp_path / "run" / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()


@pytest.mark.parametrize("damage", ["truncate", "flip", "half-written"])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(
    damage, tiny_model, tiny_data, tmp_path, one_device, capfd
):
    config = config_of(tiny_model, tiny_data, tmp_path / "run", steps=8)
    sft.main(config)
    expected = final(tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "8"
    data = max((newest / "state" / "d").iterdir(), key=lambda f: f.stat().st_size)
    if damage == "truncate":
        data.write_bytes(data.read_bytes()[:-7])
    elif damage == "flip":
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    else:
        newest.rename(newest.with_name("8.orbax-checkpoint-tmp"))
    (tmp_path / "run" / "final").rename(tmp_path / "first")
    sft.main(config)
    said = capfd.readouterr().err
    assert "continuing after step 4 of 8" in said
    assert damage == "half-written" or "checkpoint of step 8 is damaged (state/d/" in said
    found = final(tmp_path / "run")
    assert all(expected[name].tobytes() == found[name].tobytes() for name in expected)
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(9))


@pytest.fixture(scope="module")
def one_microbatch_on_one_device(tiny_model, tiny_data, tmp_path_factory):
    output = tmp_path_factory.mktemp("reference") / "run"
    with on_one_device():
        sft.main(config_of(tiny_model, tiny_data, output, steps=5, batch_size=32, packing=False))
    return final(output)


ALL_AXES = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("microbatches", "mesh"), [(2, None), (4, None), (1, {"fsdp": 8}), (4, {"fsdp": 8}), (1, ALL_AXES), (2, ALL_AXES)]
)
def test_microbatches_and_meshes_give_the_same_parameters(
    microbatches, mesh, one_microbatch_on_one_device, tiny_model, tiny_data, tmp_path
):
    config = config_of(tiny_model, tiny_data, tmp_path / "run", steps=5, batch_size=32, packing=False)
    sizes = MeshConfig(**{"data": 1, "fsdp": 1, **(mesh or {})})
    with on_one_device() if mesh is None else contextlib.nullcontext():
        sft.main(dataclasses.replace(config, mesh=sizes, microbatches=microbatches))
    found = final(tmp_path / "run")
    for name, expected in one_microbatch_on_one_device.items():
        np.testing.assert_allclose(found[name], expected, atol=1e-5, err_msg=name)
