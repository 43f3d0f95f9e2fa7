"""How many directions pooled features use, without labels."""
