"""Attention that reads the paged KV cache in place."""
