"""Source code as documents: signals of a file, licences, and repositories in the order of their imports."""
