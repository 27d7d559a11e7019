"""Floor 8: one file per command. Its config becomes model, data, algorithm and state, and then `fit`."""
