"""Classification from a few labels per class."""
