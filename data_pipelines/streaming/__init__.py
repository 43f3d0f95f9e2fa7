"""From data sets to the exactly resumable stream of batches."""
