"""Templates, launch and supervisor, on a real Slurm."""
