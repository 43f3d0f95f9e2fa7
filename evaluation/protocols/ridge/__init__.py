"""Closed-form linear classifier on frozen features."""
