"""From pages to text, and text made regular."""
