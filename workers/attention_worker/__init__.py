"""Holds keys and values for model ranks and attends to them, and nothing else (Lamina, Chen et al. 2024)."""
