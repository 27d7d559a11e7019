"""Command."""

from jaxalign.runs.online_dpo import run as main  # noqa: F401
