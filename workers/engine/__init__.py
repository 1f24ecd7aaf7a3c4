"""Runs the leader of a replica: the engine, its loop, and the sequences that it computes."""
