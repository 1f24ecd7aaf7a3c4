"""Turns token ids into text as they arrive, whole characters only.

Byte-level tokenizers, which most models have, are followed byte by byte: a token always stands for the same bytes. With
others a short window is decoded again and again, because a token's text may depend on its neighbours.

``tokenizers.decoders.DecodeStream`` is not used. It cannot be flushed, it returns the prompt's text where the prompt
ends within a character, and with byte-fallback decoders one invalid byte makes it raise on every later token.
"""

import copy
from codecs import utf_8_decode
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what decoders write for bytes that are not a whole character
NUM_CONTEXT_TOKENS = 8  # of the prompt; enough for decoders that treat the first word differently
MAX_CONTEXT_TOKENS = 16  # a window that grows saves a second decoding at each push, and costs more in each
MAX_PENDING_TOKENS = 64  # each push decodes what is pending: bounds the work for a model that emits garbage
MAX_CHARACTER_TOKENS = 4  # a UTF-8 character has at most 4 bytes, a token at least 1
_NO_TOKENS: Mapping[int, str] = {}


class Decoder(Protocol):
    """Decodes one answer. It may be copied at any time with ``copy.copy``."""

    def push(self, token_ids: Sequence[int]) -> str:
        """Takes the next tokens; returns the text that is now certain."""

    def flush(self) -> str:
        """Returns what was held back, unfinished characters as U+FFFD."""


class Detokenizer:
    """Makes the decoders of one model's answers, which share what they learn of its tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._token_bytes = TokenBytes(tokenizer) if isinstance(tokenizer.decoder, ByteLevel) else None

    def decoder(self, prompt_ids: Sequence[int], shown: Mapping[int, str] = _NO_TOKENS) -> Decoder:
        """Returns a decoder for a new answer. It skips special tokens.

        Args:
            prompt_ids: what the answer continues; some tokenizers write the first word of a text without its space.
            shown: the special tokens that it does not skip, with their texts.
        """
        if shown:
            return ShowingDecoder(self.decoder, prompt_ids, shown)
        if self._token_bytes is not None:
            return ByteDecoder(self._token_bytes)
        return WindowDecoder(self._tokenizer, prompt_ids)


def _byte_characters() -> dict[str, int]:
    """Maps the characters in which byte-level vocabularies write bytes to those bytes.

    Printable characters stand for themselves, those from 256 on for the rest, as in ``bytes_to_unicode`` of GPT-2's
    encoder.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_CHARACTERS = _byte_characters()


class TokenBytes(dict[int, bytes]):
    """Maps each token of a byte-level tokenizer to its bytes, found at first use. Special tokens have none."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        # By their text, as the tokenizer itself goes by.
        self._special = {added.content for added in tokenizer.get_added_tokens_decoder().values() if added.special}

    def __missing__(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""  # as the tokenizer has it; not kept, for there is no end of such ids
        self[token_id] = b"" if token in self._special else _bytes_of(token)
        return self[token_id]


def _bytes_of(token: str) -> bytes:
    found = [_BYTE_CHARACTERS.get(character) for character in token]
    # A token with any other character, as added ones may have, is written as it is.
    return token.encode() if None in found else bytes(byte for byte in found if byte is not None)


class ByteDecoder:
    """Joins the bytes of tokens, and keeps those of an unfinished character back."""

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._unfinished = b""

    def push(self, token_ids: Sequence[int]) -> str:
        known = self._token_bytes
        data = self._unfinished + b"".join([known[token_id] for token_id in token_ids])
        text, num_taken = utf_8_decode(data, "replace", False)
        self._unfinished = data[num_taken:]
        return text

    def flush(self) -> str:
        data, self._unfinished = self._unfinished, b""
        return utf_8_decode(data, "replace", True)[0]


class WindowDecoder:
    """Decodes a short window: some tokens whose text is given out already, and those since. Its lists never change."""

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
        """Makes all pending tokens context, whose text is then ``window``."""
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


class ShowingDecoder:
    """Writes some special tokens out, and has what is between them decoded.

    Args:
        decoder: makes a decoder of what continues the given tokens.
    """

    def __init__(
        self, decoder: Callable[[Sequence[int]], Decoder], prompt_ids: Sequence[int], shown: Mapping[int, str]
    ) -> None:
        self._make = decoder
        self._inner = decoder(prompt_ids)
        self._shown = shown

    def __copy__(self) -> "ShowingDecoder":
        other = object.__new__(ShowingDecoder)
        other._make, other._shown, other._inner = self._make, self._shown, copy.copy(self._inner)
        return other

    def push(self, token_ids: Sequence[int]) -> str:
        text, start = "", 0
        for place, token_id in enumerate(token_ids):
            if token_id in self._shown:
                if place > start:
                    text += self._inner.push(token_ids[start:place])
                text += self._inner.flush() + self._shown[token_id]
                self._inner, start = self._make([token_id]), place + 1
        return text + self._inner.push(token_ids[start:]) if start < len(token_ids) else text

    def flush(self) -> str:
        return self._inner.flush()
