"""Linear classifier on frozen features."""
