"""Copies are found across shards."""
