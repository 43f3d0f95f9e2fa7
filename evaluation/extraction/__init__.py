"""Features of a data set, taken once by a frozen backbone."""
