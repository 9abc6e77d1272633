"""Backends that hold the model: whole in one process, or sharded over ranks."""
