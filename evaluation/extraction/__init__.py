"""Features of a data set, taken once by a frozen backbone: what all kinds share, and one file per kind of backbone."""
