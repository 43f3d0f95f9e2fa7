"""Bytes from disks and remote stores: locations, ranges, retries, the cache."""
