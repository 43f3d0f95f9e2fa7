"""Group masked model learning (arXiv:2205.14986)."""
