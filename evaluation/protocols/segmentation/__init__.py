"""Linear segmentation on frozen patch tokens."""
