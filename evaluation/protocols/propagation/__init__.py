"""Objects of the first frame of a video followed through it, by frozen patch tokens."""
