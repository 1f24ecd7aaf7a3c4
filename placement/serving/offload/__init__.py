"""Decides how attention is offloaded to workers that hold the keys and values (Lamina, Chen et al. 2024)."""
