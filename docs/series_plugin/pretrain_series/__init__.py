"""A kind of backbone of its own, with an objective and the way in which it is evaluated: series of numbers."""
