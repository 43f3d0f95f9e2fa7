"""Several classes per image: a linear classifier of each on frozen features."""
