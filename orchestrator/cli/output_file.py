"""Writes the files that commands make for their user."""

from pathlib import Path

from placement.errors import InvalidConfig


def write_output(path: Path, text: str, *, field: str) -> None:
    """Writes ``text`` to ``path``, which the user named as ``field``. Raises InvalidConfig where it cannot."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidConfig(
            field=field,
            value=str(path),
            problem=f"cannot be written: {(error.strerror or str(error)).lower()}",
            fix="Name a file in a directory that you may write to.",
        ) from None
