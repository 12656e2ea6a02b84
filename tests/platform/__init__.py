"""Where a process runs: worlds, ranks, and what stands in for a GPU."""
