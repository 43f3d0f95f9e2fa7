"""Masked autoencoder of point clouds (Point-MAE, arXiv:2203.06604)."""
