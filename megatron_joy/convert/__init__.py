"""Checkpoints to and from Hugging Face's format: one table of names, streamed tensor by tensor, verified."""
