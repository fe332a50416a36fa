"""Overload: how much may be in flight, and whose turn it is."""
