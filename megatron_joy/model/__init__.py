"""The architecture of a recipe as a Megatron-core model."""

from megatron_joy.platform import cpu

cpu.install()  # before the first import of Megatron-core in this room
