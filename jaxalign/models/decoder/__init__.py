"""The decoder: config, layers, attention, cache."""
