"""Optimizers, their parameter groups, and what the learning rate is at each step."""
