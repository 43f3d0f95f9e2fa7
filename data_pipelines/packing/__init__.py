"""`pretrain data pack`: files of any kind to deterministic shards."""
