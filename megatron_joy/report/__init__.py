"""Something to look at: the log of a run (writing and reading), its HTML report, its status, its TensorBoard mirror."""
