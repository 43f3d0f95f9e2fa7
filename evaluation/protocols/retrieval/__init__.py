"""Retrieval of images of the same class."""
