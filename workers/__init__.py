"""Runs a rank, one process per device: it loads its shard, keeps its KV, runs steps and serves the worker protocol."""
