"""The engine: the loop of a replica's leader, and a sequence's work in it."""
