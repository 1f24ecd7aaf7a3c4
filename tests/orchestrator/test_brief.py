"""Another program's words stay in one line, printable, and short."""

from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.brief import MAX_CHARACTERS, brief


def test_short_words_are_passed_on_as_they_are() -> None:
    assert brief('at 1(8): unknown name: "größe"') == 'at 1(8): unknown name: "größe"'


def test_breaks_escape_codes_and_turned_writing_become_blanks() -> None:
    assert brief(" a\r\nb\x1b[31mc\u202ed\u2028e\x00\x9bf\ud800 ") == "a b [31mc d e f"


def test_what_is_long_loses_its_middle_and_keeps_its_reason_at_either_end() -> None:
    words = f"Invalid URI reference '{'secret ' * 100}': unexpected character at index 8"
    said = brief(words)
    assert said.startswith("Invalid URI reference") and said.endswith(": unexpected character at index 8")
    assert len(said) == MAX_CHARACTERS and said.count("secret") < 15


@settings(deadline=None)
@given(st.text(st.characters() | st.just(" "), max_size=400), st.integers(20, 200))
def test_nothing_else_comes_through(words: str, limit: int) -> None:
    said = brief(words, limit)
    assert len(said) <= limit and said.isprintable() and said == brief(said, limit)
