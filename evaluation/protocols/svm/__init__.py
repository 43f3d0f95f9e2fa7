"""Linear support vector machine on frozen features."""
