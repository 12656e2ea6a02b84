"""What happens around the loop at its named moments; each file is one feature and may be left out."""
