"""`pretrain data verify | stats | show`: what is in shards, and whether it is whole."""
