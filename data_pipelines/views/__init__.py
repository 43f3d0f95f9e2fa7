"""From a decoded sample to the views that an objective asks for."""
