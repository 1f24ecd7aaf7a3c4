"""Says what single tokens are called in log-probabilities, and which bytes they stand for."""

import re
from codecs import getincrementaldecoder
from collections.abc import Iterable

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel

from orchestrator.gateway.answer.detokenizer import TokenBytes

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BLANK = "\N{LOWER ONE EIGHTH BLOCK}"  # how sentencepiece writes a blank


class TokenTexts:
    """Knows the tokens of one model. Learns each at its first use."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = {id for id, added in tokenizer.get_added_tokens_decoder().items() if added.special}
        self._byte_level = TokenBytes(tokenizer) if isinstance(tokenizer.decoder, ByteLevel) else None
        self._bytes: dict[int, bytes] = {}
        self._texts: dict[int, str] = {}

    def bytes_of(self, token_id: int) -> bytes:
        """Returns what the token adds to a text. Special tokens add nothing."""
        if self._byte_level is not None:
            return self._byte_level[token_id]
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = b"" if token_id in self._special else _bytes_of(self._name(token_id))
        return found

    def text_of(self, token_id: int) -> str:
        """Returns the token as a text; bytes that are no whole characters become U+FFFD."""
        found = self._texts.get(token_id)
        if found is None:
            data = self.bytes_of(token_id)
            found = self._texts[token_id] = data.decode(errors="replace") if data else self._name(token_id)
        return found

    def _name(self, token_id: int) -> str:
        """Returns the token as the vocabulary writes it; empty where the tokenizer has none for a row of the model."""
        return self._tokenizer.id_to_token(token_id) or ""


def _bytes_of(token: str) -> bytes:
    match = _BYTE.fullmatch(token)
    return bytes([int(match[1], 16)]) if match else token.replace(_BLANK, " ").encode()


class Offsets:
    """Counts where in a text tokens begin, in characters."""

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts
        self._decoder = getincrementaldecoder("utf-8")("replace")
        self._num_characters = 0

    def of(self, token_ids: Iterable[int]) -> list[int]:
        """Returns where each of the next tokens begins: after the characters that were whole before it."""
        offsets = []
        for token_id in token_ids:
            offsets.append(self._num_characters)
            self._num_characters += len(self._decoder.decode(self._texts.bytes_of(token_id)))
        return offsets
