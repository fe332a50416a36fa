"""Latent vector models: nets, their checkpoints, and the arrays they map. Knows no HTTP."""
