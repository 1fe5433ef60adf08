"""Subsets are written as releases."""
