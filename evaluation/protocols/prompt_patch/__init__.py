"""How well one patch of an object tells the others of it, by cosine similarity alone."""
