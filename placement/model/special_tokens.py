"""Reads which tokens a model's files name beside tokenizer.json, with the flags that transformers gives them.

The files are tokenizer_config.json, special_tokens_map.json and added_tokens.json. The last two count only where the
first has no ``added_tokens_decoder``, which newer versions of transformers write in their place. Pure.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from placement.errors import InvalidModel

TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
FIX_TOKENIZER = "Save the tokenizer again: AutoTokenizer.from_pretrained(path).save_pretrained(path)."

_DECODER = "added_tokens_decoder"
_EXTRA = "extra_special_tokens"
_ADDITIONAL = "additional_special_tokens"  # what older files call the former
# What transformers reads of special_tokens_map.json and tokenizer_config.json ends so: bos_token, eos_token, ...
_TOKEN = "_token"
_COMMON = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MOST_DIGITS = 9
_FLAGS = ("single_word", "lstrip", "rstrip")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenFiles:
    """The content of the files beside tokenizer.json; a file that is not there is empty."""

    config: Mapping[str, Any] = field(default_factory=dict)
    special_tokens_map: Mapping[str, Any] = field(default_factory=dict)
    added_tokens: Mapping[str, Any] = field(default_factory=dict)

    @property
    def are_recent(self) -> bool:
        """Tells whether tokenizer_config.json says everything, so that the other two files do not count."""
        return _DECODER in self.config


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedToken:
    """A token that a file names.

    Attributes:
        content: its text.
        id: the id that the file gives it; None: the next that is free.
        file: the file that gives the id, and the key in it.
        is_named: whether it has a name, such as ``eos_token``, which makes it special.
        flags: ``single_word``, ``lstrip``, ``rstrip``, ``normalized`` and ``special``, as tokenizer.json has them.
    """

    content: str
    id: int | None = None
    file: str = ""
    is_named: bool = False
    flags: Mapping[str, bool]


def special_texts(files: TokenFiles) -> dict[str, str]:
    """Returns the texts of the special tokens that have a name, such as ``eos_token``, as transformers finds them."""
    return {name: _content(value) for name, value in _named(files).items()}


def special_tokens(files: TokenFiles) -> tuple[NamedToken, ...]:
    """Lists the special tokens that have a name, in the order in which transformers adds them."""
    named = _named(files)
    order = [name for name in _COMMON if name in named] + [name for name in named if name not in _COMMON]
    return tuple(_token(named[name], is_named=True) for name in order)


def extra_tokens(files: TokenFiles) -> tuple[NamedToken, ...]:
    """Lists the special tokens that have no name, in their order."""
    return tuple(_token(value) for value in _extras(files) if _content(value))


def numbered_tokens(files: TokenFiles) -> tuple[NamedToken, ...]:
    """Lists the tokens to which a file gives an id, in the order of their ids.

    Raises:
        InvalidModel: what should list them is something else.
    """
    found = _decoder_tokens(files.config[_DECODER]) if files.are_recent else _legacy_tokens(files)
    return tuple(sorted(found, key=lambda token: token.id or 0))


def _decoder_tokens(decoder: object) -> Iterator[NamedToken]:
    where = f"{TOKENIZER_CONFIG}: {_DECODER}"
    if not isinstance(decoder, Mapping):
        raise _not_tokens(where)
    for number, value in decoder.items():
        is_id = number.isascii() and number.isdigit() and len(number) <= _MOST_DIGITS
        if not (is_id and isinstance(value, Mapping) and _content(value)):
            raise _not_tokens(where)
        yield _token(value, id=int(number), file=where)


def _legacy_tokens(files: TokenFiles) -> Iterator[NamedToken]:
    """Yields the tokens of added_tokens.json. Those that another file calls special are special."""
    named = _named(files)
    special = {_content(named[name]) for name in _COMMON if name in named}
    special.update(_content(value) for value in _own_extras(files))
    for content, number in files.added_tokens.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise _not_tokens(ADDED_TOKENS)
        if content:
            value = {"content": content, "special": content in special}
            yield _token(value, id=number, file=ADDED_TOKENS)


def _named(files: TokenFiles) -> dict[str, Any]:
    """Returns the special tokens that have a name, by name: a text, or an object that has it as ``content``."""
    sources = [files.config] if files.are_recent else [files.config, files.special_tokens_map]
    extras = [source.get(_EXTRA) for source in sources]
    sources.extend(extra for extra in extras if isinstance(extra, Mapping))
    return {
        name: value
        for source in sources
        for name, value in source.items()
        if (name.endswith(_TOKEN) or source in extras) and _content(value)
    }


def _own_extras(files: TokenFiles) -> list[Any]:
    """Returns the special tokens without a name, as far as those of added_tokens.json are compared with them."""
    own = files.config.get(_EXTRA) or files.config.get(_ADDITIONAL)
    more = None if files.are_recent else files.special_tokens_map.get(_EXTRA)
    return [value for values in (own, more) if isinstance(values, list) for value in values]


def _extras(files: TokenFiles) -> list[Any]:
    own = _own_extras(files)
    legacy = None if files.are_recent else files.special_tokens_map.get(_ADDITIONAL)
    return own if own or not isinstance(legacy, list) else legacy


def _content(value: object) -> str:
    """Returns a token's text; it is empty where the value is no token."""
    text = value.get("content") if isinstance(value, Mapping) else value
    return text if isinstance(text, str) else ""


def _token(value: Any, *, id: int | None = None, file: str = "", is_named: bool = False) -> NamedToken:
    """Makes a token of a text, which is special, or of an object, which is so where it says so or it has a name."""
    given: Mapping[str, Any] = value if isinstance(value, Mapping) else {"special": True}
    is_special = is_named or given.get("special") is True
    normalized = given.get("normalized")
    flags = {name: given.get(name) is True for name in _FLAGS} | {
        "normalized": normalized if isinstance(normalized, bool) else not is_special,
        "special": is_special,
    }
    return NamedToken(content=_content(value), id=id, file=file, is_named=is_named, flags=flags)


def _not_tokens(where: str) -> InvalidModel:
    return InvalidModel(field=where, problem="does not list tokens with their ids", fix=FIX_TOKENIZER)
