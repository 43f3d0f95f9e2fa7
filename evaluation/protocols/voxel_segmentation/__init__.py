"""Linear segmentation of volumes on frozen tokens."""
