"""Checkpoints on disk, and what a reference to one means."""
