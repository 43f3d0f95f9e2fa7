"""Group generalized mean of patch tokens, and a linear classifier."""
