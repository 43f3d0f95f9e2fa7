"""Shards behind a network: ranged or whole fetches with retries, kept in a bounded cache."""
