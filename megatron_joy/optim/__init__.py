"""Optimizers, their parameter groups, and what the learning rate is at each step."""

from megatron_joy.platform import cpu

cpu.install()  # before the first import of Megatron-core in this room
