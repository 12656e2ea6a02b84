"""FP8: Transformer Engine's scaling rules in plain torch, and matrix products under them on any machine."""
