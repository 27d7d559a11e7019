"""Eight fake devices on the CPU, strict shapes, and the real data where it is at hand."""

import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["HF_HUB_OFFLINE"] = "1"

from jaxtyping import install_import_hook

# Shape annotations are checked where every argument is an array: not on pytree dataclasses, which tree.map rebuilds.
install_import_hook(["jaxalign.ops", "jaxalign.losses", "jaxalign.kernels"], "beartype.beartype")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data and small trained models beside the repository; tests that use it skip without it."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder.name}: it is not part of the project")
    return folder
