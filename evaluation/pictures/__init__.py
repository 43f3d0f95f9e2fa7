"""What a checkpoint makes of test samples, as pictures for people: a PNG of each kind, small and of a bounded size."""
