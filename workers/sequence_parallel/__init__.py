"""Ranks that share sequences: each computes some of their tokens, and holds the KV of these."""
