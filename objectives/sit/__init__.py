"""Masked reconstruction with momentum contrast (arXiv:2104.03602)."""
