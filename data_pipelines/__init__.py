"""Files to shards, shards to an exactly resumable stream, samples to views.

Nothing is imported here: `data_pipelines.shards.source` answers a rejected request without loading numpy or torch.
"""
