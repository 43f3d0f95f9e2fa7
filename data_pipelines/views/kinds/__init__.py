"""One file per kind of view, found by `registry`."""
