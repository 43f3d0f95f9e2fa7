"""`pretrain data radiance`: photos with known cameras to voxel grids of color and opacity."""
