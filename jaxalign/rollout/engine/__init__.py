"""Engines that draw tokens: on the training devices, or a server."""
