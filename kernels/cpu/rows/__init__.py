"""Norms and gated activations, computed row by row."""
