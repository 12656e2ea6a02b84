"""Scores of documents, kept as columns, and what is selected by them."""
