"""Attention over the KV cache, where it lies."""
