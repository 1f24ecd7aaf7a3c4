"""Norms and activations, row by row."""
