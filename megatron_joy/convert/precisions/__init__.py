"""Number formats of exported weights: pure functions from a matrix to what is stored of it and back, and one table."""
