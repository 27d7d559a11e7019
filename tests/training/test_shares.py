"""Several hosts read and write a share each of checkpoints and models, and find the same damage."""

import json
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxalign.models.decoder.decoder import init_params
from jaxalign.models.files.families import model_config
from jaxalign.models.files.save import save_pretrained
from tests.shared import run_on_hosts

HOST = """
import json, resource, sys, time, types
from pathlib import Path
from jaxalign import hosts
hosts.join()
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxalign.mistake import Mistake
from jaxalign.models.decoder.decoder import make_decoder
from jaxalign.models.files import huggingface, tensors
from jaxalign.models.files.load import load_params
from jaxalign.models.files.save import complete_folder, save_pretrained
from jaxalign.models.places import make_mesh, shardings
from jaxalign.run import final
from jaxalign.training.checkpoint import Checkpoints
folder, host, results = Path(sys.argv[1]), jax.process_index(), {}

def told(run):
    try:
        return run()
    except Mistake as mistake:
        return str(mistake)

def read():
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])

# checkpoints of 64 MiB cut over the hosts, and a step that all have
mesh = make_mesh(fsdp=4)
cut, whole = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P())

def state(step):
    numbers = np.random.default_rng(step).standard_normal(1 << 23, np.float32)
    place = lambda x, to: jax.make_array_from_callback(x.shape, to, lambda index: x[index])
    return {"a": place(numbers, cut), "b": place(numbers, cut), "step": place(np.int32(step), whole)}

like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0))
checkpoints = Checkpoints(folder / "checkpoints", keep=3)
for step in (1, 2):
    before = read()
    checkpoints.save(step, state(step), {})
    checkpoints.wait()
    results["read by save"] = read() - before
results["files"] = sorted(file.name for file in (folder / "checkpoints" / "2").iterdir())
results["bytes"] = sum(f.stat().st_size for f in (folder / "checkpoints" / "2").rglob("*") if f.is_file())
results["summed"] = sorted(json.loads((folder / "checkpoints" / "2" / "checksums.json").read_text()))
before = read()
restored, _ = checkpoints.restore(like)
results["read by restore"] = read() - before
same = lambda x, y: bool((x == y).all())
shards = zip(restored["a"].addressable_shards, state(2)["a"].addressable_shards)
results["restored"] = [same(np.asarray(x.data), np.asarray(y.data)) for x, y in shards]

def flip(step):
    if host == 0:
        of_host_1 = (folder / "checkpoints" / str(step) / "state" / "ocdbt.process_1").rglob("*")
        file = max((f for f in of_host_1 if f.is_file()), key=lambda f: f.stat().st_size)
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(content)
    hosts.barrier(f"flipped {step}")

flip(2)
results["after damage"] = int(checkpoints.restore(like)[0]["step"])
flip(1)
results["all damaged"] = told(lambda: checkpoints.restore(like))
checkpoints.close()

# a model in safetensors, on meshes that cut it along rows and along columns of its file
config = huggingface.read_config(str(folder / "model"))
graphdef, abstract = make_decoder(config)
checked, seen = tensors.Tensor.checked, []
tensors.Tensor.checked = lambda tensor, array: seen.append(array.nbytes) or checked(tensor, array)
for name, axes in {"fsdp": {"fsdp": 4}, "tensor": {"fsdp": 1, "tensor": 4}, "both": {"fsdp": 2, "tensor": 2}}.items():
    seen.clear()
    params = load_params(str(folder / "model"), config, shardings=shardings(abstract, make_mesh(**axes)))
    results[f"model on {name}"] = sum(seen)
    hf = huggingface.read_hf_config(str(folder / "model"))
    save_pretrained(folder / name, params, config, hf, max_shard_bytes=1 << 20)
places = shardings(abstract, mesh)
results["not finite"] = told(lambda: load_params(str(folder / "nan"), config, shardings=places))
# an older final/ that the first host, here the slower one, puts aside
if host == 0:
    time.sleep(0.5)
with complete_folder(final.final_folder(types.SimpleNamespace(folder=folder / "run"))) as partial:
    if host == 0:
        (partial / "new").touch()
results["run"] = sorted(str(path.relative_to(folder / "run")) for path in (folder / "run").rglob("*"))
(folder / f"results.{host}").write_text(json.dumps(results))
# a full disk of the one host that writes, while the other gathers
if host == 0:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
with hosts.failing_together():
    save_pretrained(folder / "full", params, config, hf)
"""
LLAMA = {"architectures": ["LlamaForCausalLM"], "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512}
LLAMA |= {"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 64}
LLAMA |= {"rms_norm_eps": 1e-5, "tie_word_embeddings": False}


def weights(folder):
    return {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}


@pytest.fixture(scope="module")
def shares(tmp_path_factory):
    """(the folder, the results of both hosts)"""
    folder = tmp_path_factory.mktemp("shares")
    config = model_config(LLAMA)
    save_pretrained(folder / "model", init_params(config, jax.random.key(0)), config, LLAMA)
    (folder / "nan").mkdir()
    (folder / "nan" / "config.json").write_text(json.dumps(LLAMA))
    broken = weights(folder / "model")
    broken["model.layers.1.mlp.up_proj.weight"][-1, -1] = np.nan  # in the share of the last host
    save_file(broken, folder / "nan" / "model.safetensors")
    (folder / "run" / "final").mkdir(parents=True)
    (folder / "run" / "final" / "jaxalign.json").write_text('{"trained_steps": 3}')
    statuses, _, errors = run_on_hosts([sys.executable, "-c", HOST, str(folder)])
    assert all((folder / f"results.{host}").exists() for host in (0, 1)), errors
    (folder / "end").write_text(json.dumps([statuses, errors]))
    return folder, [json.loads((folder / f"results.{host}").read_text()) for host in (0, 1)]


def test_a_host_sums_what_it_wrote_and_reads_its_share(shares):
    for results in shares[1]:
        share = results["bytes"] / 2
        assert 0.9 * share < results["read by save"] < 1.1 * share
        assert results["read by restore"] < 2.2 * share  # of the blocks for their sums, and its arrays
        assert results["restored"] == [True, True]
        assert "checksums.json" in results["files"] and not [
            f for f in results["files"] if f.startswith("checksums.json.")
        ]
        assert {name.split("/")[1] for name in results["summed"]} >= {"ocdbt.process_0", "ocdbt.process_1", "metadata"}


def test_damage_to_the_files_of_one_host_is_found_by_all(shares):
    for results in shares[1]:
        assert results["after damage"] == 1
        assert "every checkpoint in" in results["all damaged"]


def test_a_model_is_read_once_by_all_hosts_together_and_written_by_one(shares):
    folder, results = shares
    expected = weights(folder / "model")
    size = sum(x.nbytes for x in expected.values())
    for name in ("fsdp", "tensor", "both"):
        assert [result[f"model on {name}"] for result in results] == [size / 2] * 2
        actual = weights(folder / name)
        assert actual.keys() == expected.keys() and len(list((folder / name).glob("*.safetensors"))) > 1
        assert all(actual[tensor].tobytes() == x.tobytes() for tensor, x in expected.items())


def test_what_one_host_meets_at_reading_and_writing_is_told_on_all(shares):
    folder, results = shares
    for result in results:
        assert "model.layers.1.mlp.up_proj.weight' holds NaN" in result["not finite"]
    statuses, errors = json.loads((folder / "end").read_text())
    assert 0 not in statuses
    assert all("full cannot be written (File too large)" in error for error in errors), errors
    assert not (folder / "full").exists() and not (folder / "full.partial").exists()


def test_no_host_looks_at_a_folder_before_the_first_has_put_it_aside(shares):
    for results in shares[1]:
        assert results["run"] == ["final", "final-3", "final-3/jaxalign.json", "final/new"]
