"""Chooses tokens from logits, and follows the grammars that restrict the choice."""
