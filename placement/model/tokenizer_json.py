"""Makes of tokenizer.json, and of what its neighbours say, the tokenizer that transformers makes of them. Pure.

Two things differ from the file. Truncation and padding, left over from training, are off: a prompt is what its client
sent. And tokens that only a neighbour names are added, since chat formats are written with them. Whoever needs the
tokenizer, in the gateway or in a worker, takes it from :func:`read_tokenizer`.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from placement.errors import InvalidModel
from placement.model.checkpoint_files import FIX_AGAIN, parse_object
from placement.model.special_tokens import (
    ADDED_TOKENS,
    SPECIAL_TOKENS_MAP,
    TOKENIZER_CONFIG,
    NamedToken,
    TokenFiles,
    extra_tokens,
    numbered_tokens,
    special_texts,
    special_tokens,
)

TOKENIZER = "tokenizer.json"
MAX_TOKENIZER_BYTES = 1 << 28
MAX_TOKENIZER_CONFIG_BYTES = 1 << 24
MAX_TOKENS_BYTES = 1 << 20

Tokenizer = Mapping[str, Any]
Read = Callable[[str, int], bytes]
"""Reads a file of the model directory, given its name and the most bytes it may have."""
Exists = Callable[[str], bool]
"""Tells whether the model directory has a file of this name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompleteTokenizer:
    """A model's tokenizer.

    Attributes:
        text: the tokenizer in the form of tokenizer.json, for a library to read.
        num_ids: one more than its largest id.
        eos_token_id: the id that ends a sequence by the tokenizer's own files; None where they name none.
        files: what the files beside tokenizer.json say.
        left_out: the tokens that a file gives an id which the model has no row for.
    """

    text: str
    num_ids: int
    eos_token_id: int | None
    files: TokenFiles
    left_out: tuple[str, ...] = ()

    def eos_token_ids(self, configured: Iterable[int]) -> tuple[int, ...]:
        """Returns all ids that end a sequence: those of the model's configuration, and the tokenizer's own.

        Fine-tunes that end turns with another token than their base model often name it nowhere else.
        """
        own = () if self.eos_token_id is None else (self.eos_token_id,)
        return tuple(dict.fromkeys((*configured, *own)))

    def known(self, token_ids: Iterable[int]) -> list[int]:
        """Returns the ids among these that the tokenizer has. A model may have rows, and so ends, beyond them."""
        return [token_id for token_id in token_ids if token_id < self.num_ids]


def read_tokenizer(read: Read, exists: Exists, *, vocab_size: int) -> CompleteTokenizer:
    """Reads tokenizer.json and the files beside it, as far as there are any.

    Args:
        read, exists: what they raise is passed on.
        vocab_size: the number of the model's rows.

    Raises:
        InvalidModel: a file is missing or damaged, or contradicts another.
    """

    def values(name: str, limit_bytes: int) -> dict[str, Any]:
        return parse_object(name, read(name, limit_bytes)) if exists(name) else {}

    files = TokenFiles(
        config=values(TOKENIZER_CONFIG, MAX_TOKENIZER_CONFIG_BYTES),
        special_tokens_map=values(SPECIAL_TOKENS_MAP, MAX_TOKENS_BYTES),
        added_tokens=values(ADDED_TOKENS, MAX_TOKENS_BYTES),
    )
    data = read(TOKENIZER, MAX_TOKENIZER_BYTES)
    given = parse_object(TOKENIZER, data)
    tokenizer, left_out = complete_tokenizer(given, files, vocab_size=vocab_size)
    eos = special_texts(files).get("eos_token")
    return CompleteTokenizer(
        text=data.decode() if tokenizer is given else json.dumps(tokenizer),
        num_ids=max(_ids(tokenizer), default=-1) + 1,
        eos_token_id=None if eos is None else _Vocabulary(tokenizer).id_of(eos),
        files=files,
        left_out=left_out,
    )


def complete_tokenizer(
    tokenizer: Tokenizer, files: TokenFiles, *, vocab_size: int
) -> tuple[Tokenizer, tuple[str, ...]]:
    """Returns the content of tokenizer.json with all tokens, and without truncation and padding; and what is left out.

    An added token is left out where its id is, or would be, one that the model has no row for. Fine-tunes often have
    such a token for padding, which is never computed. Only those that a file gives an id are returned.

    Args:
        tokenizer: the content of tokenizer.json; it is returned as it is where nothing is to change.
        files: what the files beside it say.
        vocab_size: the number of the model's rows.

    Raises:
        InvalidModel: the tokenizer has no vocabulary, or an id that the model has no row for; or a file gives a token
            an id that the tokenizer cannot give it, or the model has no row for the token that ends a sequence.
    """
    eos = special_texts(files).get("eos_token")
    tokenizer, beyond = _within_rows(tokenizer, vocab_size, eos=eos)
    _check_ids(tokenizer, vocab_size)
    vocabulary = _Vocabulary(tokenizer)
    listed = numbered_tokens(files)
    left_out = tuple(dict.fromkeys((*beyond, *_add_numbered(vocabulary, listed, vocab_size, eos=eos))))
    added = frozenset(vocabulary.added)
    # Newer files list all tokens with their flags. Older ones leave those of tokenizer.json out.
    flagged = frozenset(token.content for token in listed) if files.are_recent else added
    for token in (*special_tokens(files), *extra_tokens(files)):
        if token.content in added:
            if token.content in flagged and token.is_named:
                vocabulary.mark_special(token.content)
        elif token.content not in left_out and vocabulary.next_id(token.content) < vocab_size:
            vocabulary.add(token)
    changes: dict[str, Any] = {key: None for key in ("truncation", "padding") if tokenizer.get(key) is not None}
    if vocabulary.is_changed:
        changes["added_tokens"] = list(vocabulary.added.values())
    return {**tokenizer, **changes} if changes else tokenizer, left_out


class _Vocabulary:
    """Numbers tokens as the tokenizers library does.

    A token that the model of the tokenizer knows keeps its id when it is added. Any other gets the next after those of
    the model and of the tokens added before, in whatever order they are listed.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._model = _model_ids(tokenizer)
        self._ids: dict[str, int] = {}
        self._largest = len(tokenizer["model"]["vocab"]) - 1
        self.added: dict[str, dict[str, Any]] = {}
        self.is_changed = False
        for entry in tokenizer.get("added_tokens") or []:
            self._insert(str(entry.get("content")), dict(entry))

    def id_of(self, content: str) -> int | None:
        """Returns the token's id; None where it has none."""
        return self._ids.get(content, self._model.get(content))

    def next_id(self, content: str) -> int:
        """Returns the id that the token has, or that it gets when it is added."""
        known = self.id_of(content)
        return self._largest + 1 if known is None else known

    def add(self, token: NamedToken) -> int:
        """Adds a token, or gives it these flags where it was added before; returns its id."""
        number = self.next_id(token.content)
        before = self.added.get(token.content)
        entry = {"id": number, "content": token.content, **token.flags}
        if before is None:
            self._insert(token.content, entry)
            self.is_changed = True
        else:
            # What was hidden in answers once stays hidden.
            entry |= {"id": before.get("id", number), "special": token.flags["special"] or bool(before.get("special"))}
            self.is_changed |= entry != before
            self.added[token.content] = entry
        return number

    def mark_special(self, content: str) -> None:
        """Makes an added token a special one."""
        self.is_changed |= self.added[content].get("special") is not True
        self.added[content]["special"] = True

    def _insert(self, content: str, entry: dict[str, Any]) -> None:
        self._ids[content] = number = self.next_id(content)
        self._largest = max(self._largest, number)
        self.added[content] = entry


def _within_rows(tokenizer: Tokenizer, vocab_size: int, *, eos: str | None) -> tuple[Tokenizer, tuple[str, ...]]:
    """Returns the tokenizer without added tokens that the model has no row for and that it can do without; and those.

    It can do without those that neither end a sequence nor are put around every text.
    """
    added = tokenizer.get("added_tokens")
    needed = json.dumps(tokenizer.get("post_processor"))

    def is_beyond(entry: object) -> bool:
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            return False
        number, content = entry.get("id"), entry["content"]
        is_spare = content != eos and json.dumps(content) not in needed
        return isinstance(number, int) and number >= vocab_size and is_spare

    if not isinstance(added, list) or not any(map(is_beyond, added)):
        return tokenizer, ()
    kept = [entry for entry in added if not is_beyond(entry)]
    return {**tokenizer, "added_tokens": kept}, tuple(entry["content"] for entry in added if is_beyond(entry))


def _add_numbered(
    vocabulary: _Vocabulary, listed: Iterable[NamedToken], vocab_size: int, *, eos: str | None
) -> tuple[str, ...]:
    """Adds the tokens to which a file gives an id; returns those that are left out. Raises InvalidModel."""
    left_out: list[str] = []
    for token in listed:
        is_new = vocabulary.id_of(token.content) is None
        if is_new and (token.id or 0) >= vocab_size and token.content != eos:
            left_out.append(token.content)
            continue
        if is_new:
            _check_new(token, vocabulary.next_id(token.content), vocab_size)
        vocabulary.add(token)
    return tuple(left_out)


def _check_new(token: NamedToken, number: int, vocab_size: int) -> None:
    """Raises InvalidModel where a token that tokenizer.json lacks cannot have the id that its file gives it."""
    if number != token.id:
        problem = f"gives {token.content!r} the id {token.id}; {TOKENIZER} lacks it, and the next free id is {number}"
        raise InvalidModel(field=token.file, problem=problem, fix="Use the files that were saved with the model.")
    if number >= vocab_size:
        problem = (
            f"gives {token.content!r}, which ends a sequence, the id {number}, "
            f"which is not below vocab_size = {vocab_size}"
        )
        fix = "Use the files that were saved with the model, or name another eos_token."
        raise InvalidModel(field=token.file, problem=problem, fix=fix)


def _model_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Returns the ids of the tokenizer's model, without added tokens. Raises InvalidModel where it has none."""
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocabulary, dict):
        return vocabulary
    if isinstance(vocabulary, list) and all(isinstance(item, list) and item for item in vocabulary):
        return {str(item[0]): number for number, item in enumerate(vocabulary)}
    fix = "Save the tokenizer as a fast one: tokenizer.save_pretrained(path)."
    raise InvalidModel(field=TOKENIZER, problem="has no model.vocab", fix=fix)


def _ids(tokenizer: Tokenizer) -> list[Any]:
    """Returns all ids as the file has them."""
    added = tokenizer.get("added_tokens") or []
    if not isinstance(added, list):
        added = [added]
    return [*_model_ids(tokenizer).values(), *(item.get("id") if isinstance(item, dict) else None for item in added)]


def _check_ids(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Checks that the tokenizer makes no id that the embedding has no row for."""
    ids = _ids(tokenizer)
    if not all(isinstance(number, int) for number in ids):
        raise InvalidModel(field=TOKENIZER, problem="has a token whose id is not a number", fix=FIX_AGAIN)
    largest = max(ids, default=-1)
    if largest >= vocab_size:
        raise InvalidModel(
            field=TOKENIZER,
            value=largest,
            problem=f"has a token id that is not below vocab_size = {vocab_size} of config.json",
            fix="Use the tokenizer.json that was saved with the model.",
        )
