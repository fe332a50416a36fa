"""The registry: versions, their files, cards and aliases."""
