"""From files to documents, a module for each family of formats."""
