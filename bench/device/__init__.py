"""Checks and measures a machine with an accelerator in a few minutes: `python3 -m bench.device`."""
