"""Makes an answer's text as its tokens arrive, and ends it before a stop string."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.gateway.answer.detokenizer import Detokenizer

_NO_TOKENS: Mapping[int, str] = {}


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Holds text that is now certain.

    Attributes:
        matched_stop: the stop string that ended the text here.
        num_tokens: how many of the tokens pushed belong to the answer: those after a match do not.
    """

    text: str
    matched_stop: str | None = None
    num_tokens: int = 0


class TextStream:
    """Makes the text of one answer, token by token.

    The deltas, joined, are what the tokenizer makes of all ids (special tokens skipped), cut before the first stop
    string. Of several stop strings in the text the one that starts first counts, and of those the longest so far.

    Args:
        stop: the stop strings, none of them empty.
        prompt_ids: what the answer continues; some decoders write the first word of a text without its space.
        shown: the special tokens that are not skipped, with their texts.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        stop: Sequence[str],
        prompt_ids: Sequence[int],
        shown: Mapping[int, str] = _NO_TOKENS,
    ) -> None:
        assert all(stop), stop
        self._decoder = detokenizer.decoder(prompt_ids, shown)
        self._stop = sorted(stop, key=len, reverse=True)
        self._held = ""  # certain, but a stop string may have begun in it
        self._ended = False

    def push(self, *token_ids: int) -> TextDelta:
        """Takes the next tokens, at least one. It is not called again after a stop string has matched."""
        assert not self._ended, "the text has ended"
        before = (copy.copy(self._decoder), self._held) if self._stop and len(token_ids) > 1 else None
        delta = self._advance(self._decoder.push(token_ids), len(token_ids))
        if delta.matched_stop is None or before is None:
            return delta
        # The text ends here; which of the tokens ended it shows when they come one by one.
        self._decoder, self._held = before
        self._ended = False
        return self._push_each(token_ids)

    def _push_each(self, token_ids: Sequence[int]) -> TextDelta:
        text = ""
        for num_tokens, token_id in enumerate(token_ids, 1):
            delta = self._advance(self._decoder.push([token_id]), 1)
            text += delta.text
            if delta.matched_stop is not None:
                return TextDelta(text, delta.matched_stop, num_tokens)
        return TextDelta(text, None, len(token_ids))

    def finish(self) -> TextDelta:
        """Returns what was held back, unfinished characters as U+FFFD. After a match that is nothing."""
        if self._ended:
            return TextDelta("")
        delta = self._advance(self._decoder.flush(), 0, final=True)
        self._ended = True
        return delta

    def _advance(self, text: str, num_tokens: int, *, final: bool = False) -> TextDelta:
        if not self._stop:
            return TextDelta(text, None, num_tokens)
        self._held += text
        begun = len(self._held) if final else self._begun()
        found = [(self._held.find(stop), -len(stop), stop) for stop in self._stop if stop in self._held]
        match = min(found, default=None)
        # A stop string that began earlier than the one found may still complete; then it is the first.
        if match is not None and match[0] <= begun:
            self._ended = True
            return TextDelta(self._held[: match[0]], match[2], num_tokens)
        certain, self._held = self._held[:begun], self._held[begun:]
        return TextDelta(certain, None, num_tokens)

    def _begun(self) -> int:
        """Returns where the first stop string begins that the text ends in or within, or the end where none does."""
        length = len(self._held)
        for start in range(max(0, length - len(self._stop[0]) + 1), length):
            tail = self._held[start:]
            if any(stop.startswith(tail) for stop in self._stop):
                return start
        return length
