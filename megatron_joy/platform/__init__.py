"""Where this process runs: device, process groups, seeds, and what Megatron-core needs when there is no GPU."""
