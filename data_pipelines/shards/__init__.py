"""Tars and what is known about them: index, manifest, the list of a source, the data set."""
