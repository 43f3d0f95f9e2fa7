"""Segmentation by the labels of the nearest training patches."""
