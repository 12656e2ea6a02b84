"""The architecture of a recipe as a Megatron-core model."""
