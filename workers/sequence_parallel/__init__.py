"""Sequence parallelism: ranks share sequences, and each computes some tokens and holds their KV."""
