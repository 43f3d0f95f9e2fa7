"""Distillation of features from a frozen teacher (arXiv:2312.06709)."""
