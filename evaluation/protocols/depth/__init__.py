"""Distances from the camera, by a linear layer on frozen patch tokens."""
