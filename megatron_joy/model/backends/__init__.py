"""Two sets of the same building blocks: plain torch (`portable`) and Transformer Engine (`te`)."""
