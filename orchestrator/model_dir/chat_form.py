"""Finds out whether a chat template wants what messages say as texts or as lists of parts.

Templates of models that also see loop over parts: given a text, such a loop goes over its letters, and leaves the whole
message out without a word. So a few conversations of words that no template has are written out in both forms. Where
texts keep as many of the words as parts do, a template gets texts.
"""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

Form = Literal["text", "parts"]
Forms = Mapping[str, Form]
"""The form of what each role says. What is not listed takes that of ``user``."""

ALL_TEXT: Forms = {"user": "text"}
MAX_FINDING_S = 3.0
_ROLES = ("user", "assistant", "system")
# Templates refuse roles they do not know, turns that do not alternate, and conversations that end in an answer.
_CONVERSATIONS = (
    (("system", "zqvrule"), ("user", "zqvask"), ("assistant", "zqvsay"), ("user", "zqvend")),
    (("user", "zqvask"), ("assistant", "zqvsay"), ("user", "zqvend")),
    (("system", "zqvrule"), ("user", "zqvask")),
    (("user", "zqvask"),),
)


def written(role: str, content: str, forms: Forms) -> dict[str, Any]:
    """Returns a message as a template gets it."""
    is_text = forms.get(role, forms["user"]) == "text"
    return {"role": role, "content": content if is_text else [{"type": "text", "text": content}]}


def find_forms(render: Callable[[Sequence[Mapping[str, Any]]], str]) -> Forms | None:
    """Returns the forms in which a template keeps most of what is said; None where it keeps nothing in any form.

    A template that refuses all conversations gets texts: why it does, it can say to a client.

    Args:
        render: writes messages out; it may raise anything.
    """
    deadline_s = time.monotonic() + MAX_FINDING_S
    was_rendered = False
    for turns in _CONVERSATIONS:
        best: Forms = ALL_TEXT
        most_kept = 0
        for forms in _candidates(turns):
            if time.monotonic() > deadline_s:
                break
            kept = _num_kept(render, turns, forms)
            was_rendered |= kept is not None
            if (kept or 0) > most_kept:
                best, most_kept = forms, kept or 0
            if most_kept == len(turns):
                return best
        if most_kept:
            return best
    return None if was_rendered else ALL_TEXT


def _candidates(turns: Sequence[tuple[str, str]]) -> list[Forms]:
    """Lists the forms that the roles of a conversation may have: texts first, then parts, then both."""
    roles = [role for role in _ROLES if any(role == other for other, _ in turns)]
    choices: tuple[Form, Form] = ("text", "parts")
    every: list[Forms] = [
        dict(zip(roles, forms, strict=True)) for forms in itertools.product(choices, repeat=len(roles))
    ]
    return [every[0], every[-1], *every[1:-1]]


def _num_kept(
    render: Callable[[Sequence[Mapping[str, Any]]], str], turns: Sequence[tuple[str, str]], forms: Forms
) -> int | None:
    """Counts the messages whose words a template writes out; None where it refuses the conversation."""
    try:
        text = render([written(role, word, forms) for role, word in turns]).casefold()
    except Exception:  # templates compute: whatever Python can raise, they can
        return None
    # A list that is written out as such, with its brackets, is not what a model was trained on.
    text = text.replace(" ", "").replace('"', "'")
    return sum(word in text.replace(f"'text':'{word}'", "") for _, word in turns)
