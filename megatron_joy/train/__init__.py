"""The training loop, one step of it, metrics, and stopping and resuming."""

from megatron_joy.platform import cpu

cpu.install()  # before the first import of Megatron-core in this room
