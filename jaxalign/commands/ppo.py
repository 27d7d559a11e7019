"""Command."""

from jaxalign.runs.ppo import run as main  # noqa: F401
