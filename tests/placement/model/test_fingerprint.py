"""Checks what two copies of a model directory are compared by, and how one that is not the same is refused."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath

import pytest

from placement.errors import InvalidModel
from placement.model.checkpoint_files import INDEX_FILE, SINGLE_FILE
from placement.model.fingerprint import (
    BLOCK_BYTES,
    NUM_BLOCKS,
    ReadAt,
    check_descriptions,
    check_weights,
    fingerprint,
    sampled_blocks,
)

HEADER = json.dumps({"x": {"dtype": "U8"}}).encode()
HEADER_END = 8 + len(HEADER)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
DIRECTORY = PurePosixPath("/models/x")


class Directory:
    """A model directory in memory, which counts the bytes of weights that are read."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files = files
        self.read_bytes = 0

    def read(self, name: str, limit_bytes: int) -> bytes:
        assert len(self.files[name]) <= limit_bytes
        return self.files[name]

    def exists(self, name: str) -> bool:
        return name in self.files

    @contextlib.contextmanager
    def opened(self, name: str) -> Iterator[tuple[int, ReadAt]]:
        def read_at(start: int, length: int) -> bytes:
            self.read_bytes += length
            return self.files[name][start : start + length]

        yield len(self.files[name]), read_at

    def digests(self) -> dict[str, bytes]:
        return fingerprint(self.read, self.exists, self.opened)


def weights(data: bytes) -> bytes:
    return len(HEADER).to_bytes(8, "little") + HEADER + data


def directory(**changes: bytes | None) -> Directory:
    """A sound directory; a change has ``__`` for a dot, and None where the file is not there."""
    files: dict[str, bytes | None] = {
        "config.json": b"{}",
        "tokenizer.json": b'{"a": 1}',
        SINGLE_FILE: weights(bytes(1000)),
        "README.md": b"",
    }
    files |= {name.replace("__", "."): data for name, data in changes.items()}
    return Directory({name: data for name, data in files.items() if data is not None})


def refusal(own: Directory, expected: Mapping[str, bytes], *, tokenizer: bool = True, names: tuple[str, ...]) -> str:
    with pytest.raises(InvalidModel) as caught:
        check_descriptions(DIRECTORY, expected, own.read, own.exists, tokenizer=tokenizer)
        check_weights(DIRECTORY, expected, names, own.opened)
    assert (caught.value.field, caught.value.fix) == ("model.path", "Copy the model there again.")
    begin = "/models/x is not the same as on the machine that serve runs on: "
    assert caught.value.problem.startswith(begin)
    return caught.value.problem.removeprefix(begin)


def test_equal_copies_are_the_same_and_unused_files_do_not_count() -> None:
    expected = directory().digests()
    assert sorted(expected) == ["config.json", SINGLE_FILE, "tokenizer.json"]
    own = directory(README__md=b"other", other__safetensors=b"stale", chat_template__jinja=b"x")
    assert own.digests() == expected
    check_descriptions(DIRECTORY, expected, own.read, own.exists, tokenizer=True)
    check_weights(DIRECTORY, expected, (SINGLE_FILE,), own.opened)


@pytest.mark.parametrize("place", [0, 1, 8, HEADER_END, HEADER_END + 1, HEADER_END + 500, HEADER_END + 999])
def test_every_byte_of_a_small_file_counts(place: int) -> None:
    data = bytearray(weights(bytes(1000)))
    data[place] ^= 1
    own = directory(model__safetensors=bytes(data))
    assert refusal(own, directory().digests(), names=(SINGLE_FILE,)) == "model.safetensors differs"


def test_other_weights_of_the_same_shapes_differ_wherever_a_tensor_lies() -> None:
    size = 100 * NUM_BLOCKS * BLOCK_BYTES
    first = directory(model__safetensors=weights(bytes(size)))
    digest = first.digests()[SINGLE_FILE]
    assert first.read_bytes < 2 * NUM_BLOCKS * BLOCK_BYTES, "a large file is not read whole"
    tensor = size // 50
    for start in range(0, size, tensor):
        other = weights(bytes(start) + b"\1" * tensor + bytes(size - start - tensor))
        assert directory(model__safetensors=other).digests()[SINGLE_FILE] != digest
    for other in (weights(bytes(size + 1)), weights(bytes(size - 1) + b"\1"), weights(b"\1" + bytes(size - 1))):
        assert directory(model__safetensors=other).digests()[SINGLE_FILE] != digest


@pytest.mark.parametrize("rest", [0, 1, NUM_BLOCKS * BLOCK_BYTES, NUM_BLOCKS * BLOCK_BYTES + 1, 10**12 + 7])
def test_blocks_lie_within_the_file_beside_each_other(rest: int) -> None:
    blocks = sampled_blocks(HEADER_END + rest, header_end=HEADER_END)
    if rest <= NUM_BLOCKS * BLOCK_BYTES:
        assert blocks == [(0, HEADER_END + rest)]
        return
    assert blocks[:2] == [(0, HEADER_END), (HEADER_END, BLOCK_BYTES)]
    assert blocks[-1] == (HEADER_END + rest - BLOCK_BYTES, BLOCK_BYTES) and len(blocks) == NUM_BLOCKS + 1
    ends = [start + length for start, length in blocks]
    assert all(end <= start for end, (start, _) in zip(ends, blocks[1:], strict=False))


def test_a_header_that_claims_to_be_huge_is_digested_as_far_as_there_is_a_file() -> None:
    assert sampled_blocks(100, header_end=10**9) == [(0, 100)]
    assert directory(model__safetensors=b"\xff" * 100).digests() != directory(model__safetensors=b"\xff" * 99).digests()


def test_all_files_that_differ_are_named_with_how() -> None:
    expected = directory(generation_config__json=b"{}").digests()
    own = directory(config__json=b"{ }", tokenizer__json=b"{}", added_tokens__json=b"{}")
    problem = refusal(own, expected, names=(SINGLE_FILE,))
    assert problem == (
        "config.json, tokenizer.json differ; generation_config.json is missing here; added_tokens.json is only here"
    )
    problem = refusal(own, expected, tokenizer=False, names=(SINGLE_FILE,))
    assert problem == "config.json differs; generation_config.json is missing here", "the tokenizer is not used there"


def sharded(first: bytes, second: bytes | None) -> Directory:
    index = json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}).encode()
    return directory(
        **{SINGLE_FILE.replace(".", "__"): None, INDEX_FILE.replace(".", "__"): index},
        a__safetensors=weights(first),
        b__safetensors=None if second is None else weights(second),
    )


def test_a_rank_looks_at_the_files_that_it_reads_alone() -> None:
    expected = sharded(b"a", b"b").digests()
    assert sorted(expected) == ["a.safetensors", "b.safetensors", "config.json", INDEX_FILE, "tokenizer.json"]
    for own in (sharded(b"a", None), sharded(b"a", b"other")):
        check_descriptions(DIRECTORY, expected, own.read, own.exists, tokenizer=True)
        check_weights(DIRECTORY, expected, ("a.safetensors",), own.opened)
    assert refusal(own, expected, names=("a.safetensors", "b.safetensors")) == "b.safetensors differs"


def test_a_checkpoint_that_is_cut_into_other_files_is_not_the_same() -> None:
    one, several = directory(), sharded(b"a", b"b")
    assert refusal(several, one.digests(), names=("a.safetensors",)) == f"{INDEX_FILE} is only here"
    assert refusal(one, several.digests(), names=(SINGLE_FILE,)) == f"{SINGLE_FILE} is only here"


@pytest.mark.parametrize("name", ["tokenizer.json", SINGLE_FILE])
def test_a_file_that_was_not_downloaded_is_refused_as_such(name: str) -> None:
    expected = directory().digests()
    own = directory(**{name.replace(".", "__"): POINTER})
    with pytest.raises(InvalidModel, match="is a pointer of Git LFS") as caught:
        check_descriptions(DIRECTORY, expected, own.read, own.exists, tokenizer=True)
        check_weights(DIRECTORY, expected, (SINGLE_FILE,), own.opened)
    assert caught.value.field == name
