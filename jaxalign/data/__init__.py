"""Floor 4, beside models: from files to batches of ids and masks, on the host."""
