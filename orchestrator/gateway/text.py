"""Token ids become text as they arrive: whole characters only, and nothing past a stop string.

``tokenizers.decoders.DecodeStream`` is not used: it cannot be flushed, it returns the prompt's text where the
prompt ends within a character, and with byte-fallback decoders one invalid byte makes it raise on every
later token.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what decoders write for bytes that are not a whole character
NUM_CONTEXT_TOKENS = 8  # of the prompt; enough for decoders that treat the first word differently
MAX_CONTEXT_TOKENS = 16  # a window that grows saves a second decoding at each push, and costs more in each
MAX_PENDING_TOKENS = 64  # each push decodes what is pending: bounds the work for a model that emits garbage
MAX_CHARACTER_TOKENS = 4  # a UTF-8 character has at most 4 bytes, a token at least 1


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text that is now certain.

    Attributes:
        matched_stop: the stop string that ended the text here.
        num_tokens: how many of the tokens pushed belong to the answer: those after a match do not.
    """

    text: str
    matched_stop: str | None = None
    num_tokens: int = 0


class TextStream:
    """The text of one answer, token by token.

    The deltas, joined, are what the tokenizer makes of all ids (special tokens skipped), cut before the first
    stop string. Of several in the text the one that starts first counts, among those the longest there so
    far.

    Args:
        stop: stop strings, none empty.
        prompt_ids: what the answer continues; some decoders write the first word of a text without its space.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], prompt_ids: Sequence[int]) -> None:
        assert all(stop), stop
        self._decoder = _Decoder(tokenizer, prompt_ids)
        self._stop = sorted(stop, key=len, reverse=True)
        self._held = ""  # certain, but a stop string may have begun in it
        self._ended = False

    def push(self, *token_ids: int) -> TextDelta:
        """Takes the next tokens, at least one. Not to be called again after a stop string has matched."""
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
        """Lets go of what was held back, unfinished characters as U+FFFD. Empty after a match."""
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
        """Where the first stop string begins that the text ends in or within; the end where none does."""
        length = len(self._held)
        for start in range(max(0, length - len(self._stop[0]) + 1), length):
            tail = self._held[start:]
            if any(stop.startswith(tail) for stop in self._stop):
                return start
        return length


class _Decoder:
    """Decodes a short window: tokens whose text is given out, as context, and those since. Its lists never change."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._pending: list[int] = []
        self._context = list(prompt_ids[-NUM_CONTEXT_TOKENS:])
        self._context_text = self._decode(self._context)
        if self._context_text.endswith(UNFINISHED):  # the answer would complete a character of the prompt
            self._context, self._context_text = [], ""

    def push(self, token_ids: Sequence[int]) -> str:
        starts = range(0, len(token_ids), MAX_PENDING_TOKENS)
        return "".join([self._push(token_ids[start : start + MAX_PENDING_TOKENS]) for start in starts])

    def _push(self, token_ids: Sequence[int]) -> str:
        before = self._pending
        self._pending = [*before, *token_ids]
        window = self._decode(self._context + self._pending)
        if not window.startswith(self._context_text):
            # Invalid bytes changed text that is already out: start afresh.
            self._context, self._context_text = [], ""
            window = self._decode(self._pending)
        text = window[len(self._context_text) :]
        if text and not text.endswith(UNFINISHED):
            self._widen(window)
            return text
        if len(token_ids) > 1:  # what comes before the unfinished character is certain
            self._pending = before
            return self._push(token_ids[:-1]) + self._push(token_ids[-1:])
        if len(self._pending) >= MAX_PENDING_TOKENS:
            return self._give_out_most()
        return ""

    def flush(self) -> str:
        return self._give_out(self._pending_text(), len(self._pending))

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _pending_text(self) -> str:
        text = self._decode(self._context + self._pending)
        if text.startswith(self._context_text):
            return text[len(self._context_text) :]
        return self._decode(self._pending)

    def _widen(self, window: str) -> None:
        """Makes all pending tokens context; ``window`` is the text of the context then."""
        if len(self._context) + len(self._pending) <= MAX_CONTEXT_TOKENS:
            self._context, self._context_text = self._context + self._pending, window
        else:
            # Cut where text was given out, so that the context begins with a whole character.
            self._context, self._context_text = self._pending, self._decode(self._pending)
        self._pending = []

    def _give_out(self, text: str, count: int) -> str:
        """Makes the first ``count`` pending tokens, whose text is ``text``, the context."""
        self._context, self._pending = self._pending[:count], self._pending[count:]
        self._context_text = self._decode(self._context)
        return text

    def _give_out_most(self) -> str:
        """Gives out all but the tokens that may be the beginning of one character."""
        whole = self._decode(self._pending)
        for count in range(MAX_PENDING_TOKENS - MAX_CHARACTER_TOKENS, MAX_PENDING_TOKENS):
            text, rest = self._decode(self._pending[:count]), self._decode(self._pending[count:])
            if rest and text + rest == whole:
                return self._give_out(text, count)
        return self._give_out(self._pending_text(), len(self._pending))
