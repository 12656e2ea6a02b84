"""Generation: the decoder against transformers, the cache against the full forward, drafts against plain greedy."""
