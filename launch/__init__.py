"""Launchers (this machine, Slurm, MPI), the demo and the doctor. Importing this never imports torch."""
