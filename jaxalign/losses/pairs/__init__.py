"""Losses of pairs of responses."""
