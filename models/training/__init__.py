"""From articles to promoted checkpoints; nothing the server loads imports this."""
