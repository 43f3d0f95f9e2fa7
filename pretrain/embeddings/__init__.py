"""What a backbone sees in each sample of a data set, as files: `embed.py` is the front door."""
