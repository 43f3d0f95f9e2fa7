"""Masked autoencoder (arXiv:2111.06377) and its form for encoders that cannot leave patches out (SimMIM)."""
