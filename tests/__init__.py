"""Tests, one folder per room; `gloo` starts the worlds of several processes."""
