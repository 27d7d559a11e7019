"""Curves of metrics as SVG."""
