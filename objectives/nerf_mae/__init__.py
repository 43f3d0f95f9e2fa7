"""NeRF-MAE: masked autoencoder of radiance grids."""
