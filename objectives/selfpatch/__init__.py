"""DINO with a loss on patches (arXiv:2206.07990)."""
