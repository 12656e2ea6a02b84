"""Filters by rules and light models: which documents stay, and which of their lines."""
