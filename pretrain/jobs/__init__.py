"""Runs as jobs of a Ray cluster: what is shipped and submitted, what runs inside, and how all of them stand."""
