"""Token ids become text as they arrive: whole characters only, and nothing past a stop string.

``tokenizers.decoders.DecodeStream`` is not used: it cannot be flushed, it returns the prompt's text where the
prompt ends within a character, and with byte-fallback decoders one invalid byte makes it raise on every
later token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what decoders write for bytes that are not a whole character
NUM_CONTEXT_TOKENS = 8  # of the prompt; enough for decoders that treat the first word differently
MAX_PENDING_TOKENS = 64  # each push decodes what is pending: bounds the work for a model that emits garbage
MAX_CHARACTER_TOKENS = 4  # a UTF-8 character has at most 4 bytes, a token at least 1


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text that is now certain.

    Attributes:
        matched_stop: the stop string that ended the text here.
    """

    text: str
    matched_stop: str | None = None


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

    def push(self, token_id: int) -> TextDelta:
        """Takes the next token. Not to be called again after a stop string has matched."""
        assert not self._ended, "the text has ended"
        return self._advance(self._decoder.push(token_id), final=False)

    def finish(self) -> TextDelta:
        """Lets go of what was held back, unfinished characters as U+FFFD. Empty after a match."""
        if self._ended:
            return TextDelta("")
        delta = self._advance(self._decoder.flush(), final=True)
        self._ended = True
        return delta

    def _advance(self, text: str, *, final: bool) -> TextDelta:
        self._held += text
        begun = len(self._held) if final else self._begun()
        found = [(self._held.find(stop), -len(stop), stop) for stop in self._stop if stop in self._held]
        match = min(found, default=None)
        # A stop string that began earlier than the one found may still complete; then it is the first.
        if match is not None and match[0] <= begun:
            self._ended = True
            return TextDelta(self._held[: match[0]], match[2])
        certain, self._held = self._held[:begun], self._held[begun:]
        return TextDelta(certain)

    def _begun(self) -> int:
        """Where the first stop string begins that the text ends in or within; the end where none does."""
        length = len(self._held)
        longest = len(self._stop[0]) if self._stop else 0
        for start in range(max(0, length - longest + 1), length):
            tail = self._held[start:]
            if any(stop.startswith(tail) for stop in self._stop):
                return start
        return length


class _Decoder:
    """Decodes a short window: the tokens of the last text given out, as context, and those since."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._pending: list[int] = []
        self._context = list(prompt_ids[-NUM_CONTEXT_TOKENS:])
        self._context_text = self._decode(self._context)
        if self._context_text.endswith(UNFINISHED):  # the answer would complete a character of the prompt
            self._context, self._context_text = [], ""

    def push(self, token_id: int) -> str:
        self._pending.append(token_id)
        text = self._pending_text()
        if text and not text.endswith(UNFINISHED):
            return self._give_out(text, len(self._pending))
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
        return self._decode(self._pending)  # invalid bytes changed text that is already out: start afresh

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
