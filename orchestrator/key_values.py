"""Writes lines of ``key=value`` pairs, for people and for other programs."""


def key_values(**pairs: object) -> str:
    """Writes ``a=1 b="two words"``. Empty values are left out; those with spaces or quotes are quoted."""
    return " ".join(f"{key}={_quoted(str(value))}" for key, value in pairs.items() if str(value))


def _quoted(text: str) -> str:
    if text.isprintable() and not any(character in text for character in " \"'=\\"):
        return text
    text = text.replace("\\", "\\\\") if text.isprintable() else printable(text)
    return '"' + text.replace('"', '\\"') + '"'


def printable(text: str) -> str:
    """Escapes line breaks and control codes, which a worker's words may hold, so that they are shown and not obeyed."""
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")
