"""How much of what a client wrote its own errors repeat: enough to find the place, never its text."""

_MAX_CHARACTERS = 40


def shown(text: str) -> str:
    """``text`` where it is short, else its length."""
    return text if len(text) <= _MAX_CHARACTERS else f"{len(text)} characters"
