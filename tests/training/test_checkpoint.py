"""Checkpoints on disk: bit for bit, kept by rule, verified, and refused where they do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxalign.mistake import Mistake
from jaxalign.models.places import make_mesh
from jaxalign.outside import Fields
from jaxalign.training.checkpoint import Checkpoints
from jaxalign.training.loop import Progress
from jaxalign.training.state import TrainState


def state(step=0, size=8):
    return {
        "step": jnp.int32(step),
        "params": {"w": jnp.arange(size, dtype=jnp.float32) + step, "half": jnp.full((4,), step, jnp.bfloat16)},
        "key": jax.random.key(step),
    }


def like(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def saved(folder, metrics, **rules):
    """Checkpoints with one save a metric, at steps 1, 2, ..."""
    checkpoints = Checkpoints(folder, **rules)
    for step, metric in enumerate(metrics, start=1):
        checkpoints.save(step, state(step), {"progress": step}, metric=metric)
    checkpoints.wait()
    return checkpoints


def test_what_was_saved_comes_back_bit_for_bit_with_its_dtypes_and_keys(tmp_path):
    checkpoints = saved(tmp_path, [None, None])
    restored, extras = checkpoints.restore(like(state()))
    assert extras.get("progress", int) == 2
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state(2)), strict=True):
        assert a.dtype == b.dtype
        a, b = (jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in (a, b))
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    checkpoints.close()


def test_a_state_saved_before_it_could_carry_anything_is_restored(tmp_path):
    older = state(3) | {"opt_state": {"count": jnp.int32(3)}}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, older, {})
    checkpoints.wait()
    restored, _ = checkpoints.restore(like(TrainState(**older)))
    np.testing.assert_array_equal(restored.params["w"], older["params"]["w"])
    assert restored.carry == ()
    checkpoints.close()


def test_a_folder_without_checkpoints_restores_nothing(tmp_path):
    checkpoints = Checkpoints(tmp_path / "none")
    assert checkpoints.restore(like(state())) is None
    assert checkpoints.restore_part("params", like(state()["params"])) is None
    checkpoints.close()


def test_the_newest_and_the_best_are_kept_and_a_second_process_knows_the_best(tmp_path):
    metrics = [3.0, 1.0, 2.0, 5.0, 4.0]
    saved(tmp_path, metrics, keep=1, keep_best=2).close()
    again = Checkpoints(tmp_path, keep=1, keep_best=2)
    assert again.steps() == [2, 3, 5] and again.best_step() == 2
    again.close()


def test_reading_deletes_nothing_whatever_the_reader_would_keep(tmp_path):
    saved(tmp_path, [None] * 4, keep=4).close()
    reader = Checkpoints(tmp_path, keep=1)
    reader.restore(like(state()))
    reader.close()
    assert sorted(folder.name for folder in tmp_path.iterdir() if folder.is_dir()) == ["1", "2", "3", "4"]


def test_a_checkpoint_is_restored_onto_another_mesh(tmp_path):
    checkpoints = saved(tmp_path, [None])
    place = NamedSharding(make_mesh(data=1, fsdp=8), P("fsdp"))
    part = {"w": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=place)}
    params, step = checkpoints.restore_part("params", part)
    assert step == 1 and params["w"].sharding == place
    np.testing.assert_array_equal(params["w"], np.arange(8) + 1)
    checkpoints.close()


def test_another_shape_or_another_leaf_is_named(tmp_path):
    checkpoints = saved(tmp_path, [None])
    with pytest.raises(ValueError, match=r"of another model or optimizer: params.w is \[8\] there and \[16\] here"):
        checkpoints.restore(like(state(size=16)))
    with pytest.raises(ValueError, match=r"params.more is absent there and \[2\] here"):
        grown = state()
        grown["params"]["more"] = jnp.zeros(2)
        checkpoints.restore(like(grown))
    with pytest.raises(ValueError, match=r"no checkpoint of step 7; those kept are 1"):
        checkpoints.restore(like(state()), step=7)
    checkpoints.close()


def flip_a_bit(folder):
    file = max((f for f in (folder / "state").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_changed_bit_is_noticed_and_the_damaged_step_put_aside_so_that_it_can_be_saved_again(tmp_path):
    saved(tmp_path / "checkpoints", [None, None, None], keep=3).close()
    flip_a_bit(tmp_path / "checkpoints" / "3")
    again = Checkpoints(tmp_path / "checkpoints", keep=3)
    restored, _ = again.restore(like(state()))
    assert int(restored["step"]) == 2 and (tmp_path / "damaged" / "3").is_dir()
    again.save(3, state(3), {"progress": 3})
    again.wait()
    assert again.steps() == [1, 2, 3] and int(again.restore(like(state()))[0]["step"]) == 3
    again.close()


def test_checksums_that_are_none_count_as_damage(tmp_path):
    saved(tmp_path, [None]).close()
    again = Checkpoints(tmp_path)
    for sums in ("[]", "null", "7", "{}", '{"state": "a"}', '{"/dev/zero": 1, "extras/metadata": 1}', "{"):
        (tmp_path / "1" / "checksums.json").write_text(sums)
        with pytest.raises(Mistake, match=r"every checkpoint in .* is damaged"):
            again.restore(like(state()))
    again.close()


def test_progress_of_another_type_is_refused_by_its_name():
    stored = {"step": 3, "tokens": 7, "skipped": 0, "skipped_in_a_row": 0}
    assert Progress.read(Fields(stored, "extras")) == Progress(step=3, tokens=7)
    for name, value in {"step": "3", "tokens": None, "ended": 1, "skipped": 1.5}.items():
        if value is not None:
            with pytest.raises(Mistake, match=f"extras: '{name}' is"):
                Progress.read(Fields(stored | {name: value}, "extras"))


def test_when_all_are_damaged_the_error_says_how_to_start_again(tmp_path):
    saved(tmp_path, [None]).close()
    flip_a_bit(tmp_path / "1")
    again = Checkpoints(tmp_path)
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged; delete the folder to start again"):
        again.restore(like(state()))
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged"):
        again.restore_part("params", like(state()["params"]))
    again.close()
