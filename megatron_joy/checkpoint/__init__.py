"""Checkpoints: sharded save and load, resharding between layouts, verification and retention."""
