"""How tokens are chosen from logits, and the grammars that restrict the choice."""
