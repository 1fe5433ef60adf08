"""Subsets are chosen by SQL over the columns."""
