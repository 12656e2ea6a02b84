"""Checkpoints: what is written is whole or not there, and any layout reads what any other wrote."""
