"""Shortens another program's words before they are passed on, as they may quote all that a client wrote."""

MAX_CHARACTERS = 160
_CUT = " … "


def brief(words: str, limit: int = MAX_CHARACTERS) -> str:
    """Returns ``words`` in one line of at most ``limit`` characters, all of them printable.

    What is too long loses its middle: compilers quote there, and say what is wrong before or after it. Line breaks,
    escape codes and characters that turn the direction of writing become blanks.
    """
    printable = "".join(character if character.isprintable() else " " for character in words)
    line = " ".join(printable.split())
    if len(line) <= limit:
        return line
    num_last = (limit - len(_CUT)) // 3
    return line[: limit - len(_CUT) - num_last].rstrip() + _CUT + line[-num_last:].lstrip()
