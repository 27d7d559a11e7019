"""The fingerprint of a model's files, and the dtype that they are in."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxalign.mistake import Mistake
from jaxalign.models.files import weights
from jaxalign.models.files.weights import PIECE, fingerprint, stored_dtype


@pytest.fixture
def model(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "model")


def changed(model, name, change, file="model.safetensors"):
    tensors = load_file(model / file)
    save_file(tensors | {name: change(tensors[name])}, model / file, metadata={"format": "pt"})


def element(x):
    x = x.copy()
    x.flat[x.size // 2] += 1e-3
    return x


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "change", [lambda x: x * np.float32(1.05), element, lambda x: x.T.copy(), lambda x: x.astype(np.float16)]
)
def test_a_change_of_a_tensor_changes_the_fingerprint(change, model):
    before = fingerprint(str(model))
    changed(model, NAME, change)
    assert fingerprint(str(model)) != before


def test_of_a_large_tensor_pieces_are_read_up_to_its_last_byte(model, monkeypatch):
    monkeypatch.setattr(weights, "WHOLE", 64)
    monkeypatch.setattr(weights, "PIECE", 8)
    before = fingerprint(str(model))
    changed(model, NAME, lambda x: x * np.float32(1.05))
    scaled = fingerprint(str(model))
    changed(model, NAME, lambda x: np.concatenate([x.ravel()[:-1], [9.0]]).astype(x.dtype).reshape(x.shape))
    assert len({before, scaled, fingerprint(str(model))}) == 3


def test_another_function_of_the_same_weights_is_another_model_and_a_note_about_them_is_not(model):
    before, path = fingerprint(str(model)), model / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"transformers_version": "9.9", "torch_dtype": "float32"}, indent=1))
    (model / "README.md").write_text("notes")
    assert fingerprint(str(model)) == before
    path.write_text(json.dumps(config | {"rope_theta": 5e5}))
    assert fingerprint(str(model)) != before
    assert fingerprint(f"config:{model}") != fingerprint(str(model))


def test_the_same_tensors_in_two_files_are_the_same_model(model):
    before, tensors = fingerprint(str(model)), load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    for number, part in enumerate((names[:5], names[5:])):
        save_file({name: tensors[name] for name in part}, model / f"part-{number}.safetensors")
    assert fingerprint(str(model)) == before


def test_adapters_heads_and_the_base_of_members_count(model, tmp_path):
    rewarding = shutil.copytree(model, tmp_path / "rewarding")
    (rewarding / "members").mkdir()
    save_file({"heads": np.ones((2, 4), np.float32)}, rewarding / "members" / "heads.safetensors")
    (rewarding / "reward.json").write_text(json.dumps({"base": str(model)}))
    seen = [fingerprint(str(rewarding))]
    save_file({"heads": np.zeros((2, 4), np.float32)}, rewarding / "members" / "heads.safetensors")
    seen.append(fingerprint(str(rewarding)))
    changed(model, NAME, element)
    seen.append(fingerprint(str(rewarding)))
    (rewarding / "reward.json").write_text(json.dumps({"base": str(rewarding)}))
    seen.append(fingerprint(str(rewarding)))
    assert len(set(seen)) == 4


def test_the_dtype_is_that_of_most_bytes(model):
    assert stored_dtype(str(model)) == "float32"
    tensors = {n: x.astype(ml_dtypes.bfloat16) for n, x in load_file(model / "model.safetensors").items()}
    norms = {n: x.astype(np.float32) for n, x in tensors.items() if "norm" in n}
    save_file(tensors | norms, model / "model.safetensors")
    assert stored_dtype(str(model)) == "bfloat16"
    (model / "model.safetensors").unlink()
    assert stored_dtype(str(model)) is None


@pytest.mark.parametrize(
    "content", [b"", b"abc", b"\xff" * 40, b"\x02\0\0\0\0\0\0\0[]", b'\x0b\0\0\0\0\0\0\0{"a": null}']
)
def test_a_damaged_file_is_named(content, model):
    (model / "model.safetensors").write_bytes(content)
    with pytest.raises(Mistake, match=r"model\.safetensors"):
        stored_dtype(str(model))


def test_all_bytes_are_read_on_request(model):
    """A change between the pieces of a large tensor, which only a whole reading sees."""
    tensors = load_file(model / "model.safetensors")
    large = np.zeros((2**20,), np.float32)
    fingerprints = []
    for at in (None, 2):  # the second piece begins far behind the end of the first
        changed = large.copy()
        changed[[] if at is None else PIECE // 4 + at] = 1.0
        save_file(tensors | {"large": changed}, model / "model.safetensors", metadata={"format": "pt"})
        fingerprints.append([fingerprint(str(model), whole=whole) for whole in (False, True)])
    (sample, whole), (same, other) = fingerprints
    assert sample == same and whole != other
