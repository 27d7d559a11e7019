"""Command."""

from jaxalign.runs.rl import run_grpo, run_rloo


def main(config):
    """Runs it."""
    from jaxalign.config.on_policy import RLOOConfig

    return (run_rloo if type(config) is RLOOConfig else run_grpo)(config)
