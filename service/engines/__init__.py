"""Engines: batchers around models, and the router that chooses one."""
