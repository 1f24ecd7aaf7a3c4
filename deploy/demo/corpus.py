"""Turns the King James Bible of Debian's package ``bible-kjv-text`` into clean prose documents.

Every chapter becomes one document: the name of its book, an empty line, and the chapter as one
paragraph without verse numbers. Every 33rd chapter is held out for measuring perplexity.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

END_OF_TEXT = "<|end_of_text|>"
HELD_OUT_EVERY = 33
HELD_OUT_OFFSET = 16

_VERSE = re.compile(r"^(\d?[A-Za-z]+)(\d+):\d+ (.*)$")

# The abbreviations that ``bible -f`` prints, with the title each book gets in the training text.
BOOKS: dict[str, str] = {
    "Ge": "Genesis", "Exo": "Exodus", "Lev": "Leviticus", "Num": "Numbers", "Deu": "Deuteronomy",
    "Josh": "Joshua", "Jdgs": "Judges", "Ruth": "Ruth", "1Sm": "The First Book of Samuel",
    "2Sm": "The Second Book of Samuel", "1Ki": "The First Book of the Kings",
    "2Ki": "The Second Book of the Kings", "1Chr": "The First Book of the Chronicles",
    "2Chr": "The Second Book of the Chronicles", "Ezra": "Ezra", "Neh": "Nehemiah", "Est": "Esther",
    "Job": "Job", "Psa": "Psalms", "Prv": "Proverbs", "Eccl": "Ecclesiastes",
    "SSol": "The Song of Solomon", "Isa": "Isaiah", "Jer": "Jeremiah", "Lam": "Lamentations",
    "Eze": "Ezekiel", "Dan": "Daniel", "Hos": "Hosea", "Joel": "Joel", "Amos": "Amos",
    "Obad": "Obadiah", "Jonah": "Jonah", "Mic": "Micah", "Nahum": "Nahum", "Hab": "Habakkuk",
    "Zep": "Zephaniah", "Hag": "Haggai", "Zec": "Zechariah", "Mal": "Malachi", "Mat": "Matthew",
    "Mark": "Mark", "Luke": "Luke", "John": "John", "Acts": "The Acts of the Apostles",
    "Rom": "Romans", "1Cor": "First Corinthians", "2Cor": "Second Corinthians", "Gal": "Galatians",
    "Eph": "Ephesians", "Phi": "Philippians", "Col": "Colossians", "1Th": "First Thessalonians",
    "2Th": "Second Thessalonians", "1Tim": "First Timothy", "2Tim": "Second Timothy",
    "Titus": "Titus", "Phmn": "Philemon", "Heb": "Hebrews", "Jas": "James", "1Pet": "First Peter",
    "2Pet": "Second Peter", "1Jn": "First John", "2Jn": "Second John", "3Jn": "Third John",
    "Jude": "Jude", "Rev": "Revelation",
}  # fmt: skip


def read_chapters() -> list[str]:
    """Reads the whole text as one document per chapter, in the order of the books."""
    command = ["bible", "-f", "gen1:1-rev22:21"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    chapters: dict[tuple[str, str], list[str]] = {}
    for line in printed.splitlines():
        match = _VERSE.match(line)
        if match is None:
            raise ValueError(f"not a verse: {line!r}")
        book, chapter, verse = match.groups()
        chapters.setdefault((book, chapter), []).append(" ".join(verse.split()))
    return [f"{BOOKS[book]}\n\n{' '.join(verses)}" for (book, _), verses in chapters.items()]


def split_chapters(chapters: list[str]) -> tuple[list[str], list[str]]:
    """Separates training from held-out chapters. The choice depends on nothing but the order of the chapters."""
    train = [text for i, text in enumerate(chapters) if i % HELD_OUT_EVERY != HELD_OUT_OFFSET]
    return train, chapters[HELD_OUT_OFFSET::HELD_OUT_EVERY]


def write_documents(path: Path, documents: list[str], limit_bytes: int) -> None:
    """Writes every fourth document, as many as fit the limit, and ends each by a line with the end marker."""
    kept = ""
    for document in documents[1::4] + documents[3::4]:
        block = f"{document}\n{END_OF_TEXT}\n"
        if len((kept + block).encode()) <= limit_bytes:
            kept += block
    path.write_text(kept, encoding="utf-8")


def read_documents(path: Path) -> list[str]:
    """Reads the documents that ``write_documents`` wrote."""
    blocks = path.read_text(encoding="utf-8").split(f"\n{END_OF_TEXT}\n")
    return [block for block in blocks if block]
