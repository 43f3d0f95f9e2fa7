"""Hidden blocks of held-out volumes and radiance grids, filled in."""
