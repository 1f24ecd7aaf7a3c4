"""Manages KV blocks: which are free, who keeps the others, and where those of a sequence lie."""
