"""Personal data and secrets: found by form and checksum, replaced by typed placeholders."""
