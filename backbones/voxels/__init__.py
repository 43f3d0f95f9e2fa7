"""Encoders of volumes and voxel grids: a plain 3D ViT and a 3D Swin transformer."""
