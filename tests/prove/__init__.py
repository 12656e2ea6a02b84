"""The proof of layouts: what it shrinks, what it compares, and that it notices a wrong layout."""
