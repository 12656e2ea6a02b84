"""What happens to each document between reading and deduplication: a chain of blocks, each keeps or drops it."""
