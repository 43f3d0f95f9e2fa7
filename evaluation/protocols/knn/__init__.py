"""Weighted vote of the nearest training images."""
