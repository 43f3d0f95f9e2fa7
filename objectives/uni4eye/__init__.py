"""Masked autoencoder of images and volumes in one encoder (Uni4Eye, arXiv:2203.04614)."""
