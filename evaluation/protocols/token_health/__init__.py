"""Whether patch tokens stay apart from each other, and of ordinary length, without labels."""
