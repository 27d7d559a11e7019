"""Parameters that wait in the hosts' memory, pinned, and are on the devices only while something computes with them."""

from __future__ import annotations

from typing import Any

import jax

from jaxalign.types import PyTree

HOST = "pinned_host"


def on_host(sharding: Any) -> Any:
    """The same shares of an array in the memory of the hosts of its devices."""
    return sharding.with_memory_kind(HOST)


def offloaded(tree: PyTree) -> PyTree:
    """The arrays in the hosts' memory; those on the devices go with the tree that is given."""
    return jax.tree.map(lambda x: jax.device_put(x, on_host(x.sharding)), tree)


def fetched(tree: PyTree) -> PyTree:
    """The arrays on the devices, beside those on the hosts; inside a jitted function until their last use there."""
    return jax.device_put(tree, jax.memory.Space.Device)
