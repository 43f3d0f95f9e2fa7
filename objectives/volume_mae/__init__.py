"""Masked autoencoder of volumes (arXiv:2111.06377 in three dimensions)."""
