"""Settings of the tiny runs: seconds each, and long enough that their losses fall and their rewards rise."""

from jaxalign.config.shared import BestCheckpointConfig, CheckpointConfig, MeshConfig, OptimizerConfig

OFFLINE = {
    "steps": 8,
    "batch_size": 8,
    "max_length": 16,
    "remat": "none",
    "mesh": MeshConfig(data=1, fsdp=1),
    "optimizer": OptimizerConfig(learning_rate=2e-3),
    "checkpoint": BestCheckpointConfig(every=4),
}
ON_POLICY = {
    "reward": "tests.commands.rewards:dogs",
    "steps": 12,
    "batch_size": 4,
    "n": 8,
    "max_length": 16,
    "max_new_tokens": 8,
    "remat": "none",
    "samples": 2,
    "eval_every": 4,
    "slots": 8,
    "mesh": MeshConfig(data=1, fsdp=1),
    "optimizer": OptimizerConfig(learning_rate=1e-2, schedule="constant"),
    "checkpoint": CheckpointConfig(every=6),
}
