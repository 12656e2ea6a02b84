"""What ranks and their supervisor tell each other."""
