"""KV blocks: which are free, who keeps the others, and where a sequence's lie."""
