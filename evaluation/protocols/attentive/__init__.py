"""Attentive probe: a learned query that looks for the class among patch tokens."""
