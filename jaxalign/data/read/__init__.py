"""Rows from files and hubs: formats, chat templates, tokens."""
