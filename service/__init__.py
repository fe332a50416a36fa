"""LVM Serve: HTTP in, HTTP out. Imports no torch."""
