"""Floor 5: training methods as pairs of pure functions. They know models, ops and losses, not disks or meshes."""
