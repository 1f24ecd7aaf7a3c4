"""Lines of ``key=value`` pairs, for people and for other programs."""


def key_values(**pairs: object) -> str:
    """``a=1 b="two words"``: values that are empty are left out, those with spaces or quotes are quoted."""
    return " ".join(f"{key}={_quoted(str(value))}" for key, value in pairs.items() if str(value))


def _quoted(text: str) -> str:
    if text.isprintable() and not any(character in text for character in " \"'=\\"):
        return text
    text = text.replace("\\", "\\\\") if text.isprintable() else printable(text)
    return '"' + text.replace('"', '\\"') + '"'


def printable(text: str) -> str:
    """What a worker says may hold line breaks and escape codes: they are shown, not obeyed."""
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")
