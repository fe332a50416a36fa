"""Processes: the server, its workers, and the worker that owns the device."""
