"""The training side of data: shards, manifests, sample order, batches. This file imports nothing."""
