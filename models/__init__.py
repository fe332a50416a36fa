"""Latent vector models: nets, checkpoints, retrieval. Arrays in, arrays out; no HTTP."""
