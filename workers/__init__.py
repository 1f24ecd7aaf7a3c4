"""One process per device: a rank. Loads its shard, keeps its KV, runs steps, serves the worker protocol."""
