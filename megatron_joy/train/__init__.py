"""The training loop, one step of it, metrics, and stopping and resuming."""
