"""The architecture against plain restatements of its definition."""
