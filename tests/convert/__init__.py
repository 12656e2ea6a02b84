"""Conversion: one table, both directions, proved against transformers and the training model."""
