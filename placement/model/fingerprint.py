"""Digests the files of a model directory, so that two machines can tell whether they have the same model. Pure.

The small files are digested whole. Of a safetensors file it is the size, the header and blocks all over the rest, so
that the largest model takes milliseconds; other weights of the same shapes differ nearly everywhere.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import PurePath

from placement.errors import InvalidModel
from placement.model.checkpoint_files import (
    INDEX_FILE,
    MAX_CONFIG_BYTES,
    MAX_INDEX_BYTES,
    SINGLE_FILE,
    is_lfs_pointer,
    lfs_pointer,
    parse_index,
)
from placement.model.special_tokens import ADDED_TOKENS, SPECIAL_TOKENS_MAP, TOKENIZER_CONFIG
from placement.model.tokenizer_json import (
    MAX_TOKENIZER_BYTES,
    MAX_TOKENIZER_CONFIG_BYTES,
    MAX_TOKENS_BYTES,
    TOKENIZER,
    Exists,
    Read,
)

NUM_BLOCKS, BLOCK_BYTES = 64, 4096

ReadAt = Callable[[int, int], bytes]
"""Reads so many bytes of an open file, from an offset on."""
Open = Callable[[str], AbstractContextManager[tuple[int, ReadAt]]]
"""Opens a file of the directory, by its name: gives its size, and how to read it."""

_CONFIG = "config.json"
_CONFIGS = {_CONFIG: MAX_CONFIG_BYTES, "generation_config.json": MAX_CONFIG_BYTES}
_TOKENIZERS = {
    TOKENIZER: MAX_TOKENIZER_BYTES,
    TOKENIZER_CONFIG: MAX_TOKENIZER_CONFIG_BYTES,
    SPECIAL_TOKENS_MAP: MAX_TOKENS_BYTES,
    ADDED_TOKENS: MAX_TOKENS_BYTES,
}
_INDEX = {INDEX_FILE: MAX_INDEX_BYTES}
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # what the safetensors library reads at the most
_POINTER_BYTES = 256


def fingerprint(read: Read, exists: Exists, opened: Open) -> dict[str, bytes]:
    """Digests every file that serving the model uses, by the file's name.

    Args:
        read, exists, opened: what they raise is passed on.

    Raises:
        InvalidModel: a file stands for one that was not downloaded, or the index is damaged.
    """
    if exists(SINGLE_FILE):
        weights: Iterable[str] = (SINGLE_FILE,)
    else:
        weights = sorted(set(parse_index(read(INDEX_FILE, MAX_INDEX_BYTES)).values()))
    return digest_descriptions(read, exists, tokenizer=True) | digest_weights(weights, opened)


def digest_descriptions(read: Read, exists: Exists, *, tokenizer: bool) -> dict[str, bytes]:
    """Digests the files beside the weights, as far as there are any; config.json there must be.

    Args:
        read, exists: what they raise is passed on.
        tokenizer: whether the tokenizer is used too.
    """
    digests: dict[str, bytes] = {}
    for name, limit_bytes in _descriptions(exists, tokenizer=tokenizer).items():
        if name == _CONFIG or exists(name):
            data = read(name, limit_bytes)
            if is_lfs_pointer(data):
                raise lfs_pointer(name)
            digests[name] = hashlib.sha256(data).digest()
    return digests


def digest_weights(names: Iterable[str], opened: Open) -> dict[str, bytes]:
    """Digests the size, the header and some blocks of each of these safetensors files."""
    digests: dict[str, bytes] = {}
    for name in names:
        with opened(name) as (num_bytes, read_at):
            begin = read_at(0, min(_POINTER_BYTES, num_bytes))
            if is_lfs_pointer(begin):
                raise lfs_pointer(name)
            digest = hashlib.sha256(num_bytes.to_bytes(8, "little"))
            header_bytes = min(int.from_bytes(begin[:_LENGTH_BYTES], "little"), _MAX_HEADER_BYTES)
            for start, length in sampled_blocks(num_bytes, header_end=_LENGTH_BYTES + header_bytes):
                digest.update(read_at(start, length))
        digests[name] = digest.digest()
    return digests


def sampled_blocks(num_bytes: int, *, header_end: int) -> list[tuple[int, int]]:
    """Lists the start and the length of all that is digested of a safetensors file.

    It is the header, and as many blocks at equal distances, the first and the last of the rest among them. Where they
    would not fit beside each other, it is the whole file.
    """
    rest = num_bytes - header_end
    if rest <= NUM_BLOCKS * BLOCK_BYTES:
        return [(0, num_bytes)]
    starts = (header_end + number * (rest - BLOCK_BYTES) // (NUM_BLOCKS - 1) for number in range(NUM_BLOCKS))
    return [(0, header_end), *((start, BLOCK_BYTES) for start in starts)]


def check_descriptions(
    directory: PurePath, expected: Mapping[str, bytes], read: Read, exists: Exists, *, tokenizer: bool
) -> None:
    """Checks that the files beside the weights are those of the fingerprint ``expected``.

    Args:
        directory: the path of the directory, for the error's text.
        tokenizer: whether the tokenizer is used here too.

    Raises:
        InvalidModel: they are not.
    """
    own = digest_descriptions(read, exists, tokenizer=tokenizer)
    names = _descriptions(exists, tokenizer=tokenizer)
    _check_same(directory, {name: digest for name, digest in expected.items() if name in names}, own)


def check_weights(directory: PurePath, expected: Mapping[str, bytes], names: Iterable[str], opened: Open) -> None:
    """Checks that the safetensors files ``names`` are those of the fingerprint ``expected``; others are not looked at.

    Raises:
        InvalidModel: they are not.
    """
    own = digest_weights(names, opened)
    _check_same(directory, {name: digest for name, digest in expected.items() if name in own}, own)


def _descriptions(exists: Exists, *, tokenizer: bool) -> dict[str, int]:
    """Returns how large each file beside the weights may be. A single file of weights makes an index unused."""
    return _CONFIGS | (_TOKENIZERS if tokenizer else {}) | ({} if exists(SINGLE_FILE) else _INDEX)


def _check_same(directory: PurePath, expected: Mapping[str, bytes], own: Mapping[str, bytes]) -> None:
    """Raises InvalidModel that names each file that differs, is missing, or should not be there."""
    differing = [name for name in own if name in expected and own[name] != expected[name]]
    missing = sorted(name for name in expected if name not in own)
    added = [name for name in own if name not in expected]
    said = [
        f"{', '.join(names)} {one if len(names) == 1 else many}"
        for names, one, many in (
            (differing, "differs", "differ"),
            (missing, "is missing here", "are missing here"),
            (added, "is only here", "are only here"),
        )
        if names
    ]
    if said:
        raise InvalidModel(
            field="model.path",
            problem=f"{directory} is not the same as on the machine that serve runs on: {'; '.join(said)}",
            fix="Copy the model there again.",
        )
