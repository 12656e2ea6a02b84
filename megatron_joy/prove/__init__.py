"""`joy prove`: a recipe's parallel layout, shrunk in width only, on CPU against one process. Light to import."""
