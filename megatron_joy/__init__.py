"""Megatron-Joy: the pretraining stack behind JoyAI-LLM Flash, on Megatron-core."""

__version__ = "0.1.0"
