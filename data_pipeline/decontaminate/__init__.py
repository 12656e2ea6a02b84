"""Keeps evaluation sets out of the training text."""
