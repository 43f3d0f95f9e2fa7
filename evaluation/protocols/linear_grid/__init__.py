"""Linear classifiers on frozen features of one or several layers, the best of a grid."""
