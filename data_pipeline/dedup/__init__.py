"""Which documents say the same: MinHash signatures, candidates from bands, exact Jaccard, clusters; repeated lines."""
