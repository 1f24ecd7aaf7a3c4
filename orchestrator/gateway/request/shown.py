"""Decides how much of what a client wrote an error repeats: enough to find the place, never a whole text."""

_MAX_CHARACTERS = 40


def shown(text: str) -> str:
    """Returns ``text`` where it is short, else its length."""
    return text if len(text) <= _MAX_CHARACTERS else f"{len(text)} characters"
