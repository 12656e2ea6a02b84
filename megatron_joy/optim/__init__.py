"""Optimizers and their parameter groups."""

from megatron_joy.platform import cpu

cpu.install()  # before the first import of Megatron-core in this room
