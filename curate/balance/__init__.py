"""Text-driven balancing of concepts."""
