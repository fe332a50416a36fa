"""Text to vectors: chunks and encoders."""
