"""Packs what a session's frames carry besides rows: orders, and what both sides say at the beginning. Pure.

An order is a list of 64-bit numbers, with the hashes of names behind them. Lists are preceded by their length.
"""

import struct
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TypeVar

from placement.serving.offload.deltas import Appended, Begun, Cut, Delta, Freed, Moved
from placement.serving.offload.orders import Geometry, QuerySpan, Seen, StepOrder
from workers.transport.errors import BadFrame

TAG = struct.Struct("<IHH")
"""What each frame of a session begins with: the number of its order, the layer, and which rows it has."""

QUERY_ROWS, KV_ROWS = 1, 2
"""The rows that a frame has, as bits."""

_SIZES = struct.Struct("<II")  # numbers of an order, bytes of its hashes
_GEOMETRY = struct.Struct("<IIIIIQI?d")
_MOST_NUMBERS = 1 << 26
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """What a model rank says of itself and its session.

    Attributes:
        replica: the name of the replica.
        resumes: whether it wants what the worker still holds of its sessions before.
    """

    replica: str
    rank: int
    epoch: int
    resumes: bool
    geometry: Geometry


class _Numbers:
    """Reads numbers one after the other. Raises BadFrame where there are too few."""

    def __init__(self, values: array) -> None:  # type: ignore[type-arg]
        self._values = values
        self._place = 0

    def one(self) -> int:
        return self.some(1)[0]

    def some(self, count: int) -> tuple[int, ...]:
        end = self._place + count
        if not 0 <= count <= len(self._values) or end > len(self._values):
            raise BadFrame("an order ends too early")
        found = tuple(self._values[self._place : end])
        self._place = end
        return found

    def listed(self) -> tuple[int, ...]:
        return self.some(self.one())

    def times(self, read: Callable[[], _T]) -> tuple[_T, ...]:
        count = self.one()
        if not 0 <= count <= len(self._values):
            raise BadFrame("an order ends too early")
        return tuple(read() for _ in range(count))

    def pairs(self) -> tuple[tuple[int, int], ...]:
        flat = self.some(2 * self.one())
        return tuple(zip(flat[::2], flat[1::2], strict=True))

    @property
    def is_at_end(self) -> bool:
        return self._place == len(self._values)


def pack_order(order: StepOrder) -> bytes:
    """Packs an order."""
    numbers = array("q", [len(order.tables)])
    for delta in order.tables:
        numbers.extend(_delta_numbers(delta))
    numbers.append(len(order.spans))
    for span in order.spans:
        numbers.extend((span.sequence, span.num_queries, span.num_new, len(span.seen)))
        for seen in span.seen:
            numbers.append(len(seen))
            numbers.extend(chain.from_iterable(seen))
    numbers.append(order.num_whole)
    for values in (order.slots, order.forgotten):
        numbers.append(len(values))
        numbers.extend(values)
    numbers.append(len(order.names))
    for block, text_hash in order.names:
        numbers.extend((block, len(text_hash)))
    hashes = b"".join(text_hash for _, text_hash in order.names)
    return _SIZES.pack(len(numbers), len(hashes)) + numbers.tobytes() + hashes


def unpack_order(data: bytes | memoryview) -> StepOrder:
    """Unpacks an order. Raises BadFrame."""
    numbers, hashes = _split(data)
    tables = numbers.times(lambda: _read_delta(numbers))
    spans = numbers.times(lambda: _read_span(numbers))
    num_whole, slots, forgotten = numbers.one(), numbers.listed(), numbers.listed()
    named = numbers.pairs()
    if not numbers.is_at_end:
        raise BadFrame("an order has more than it should")
    return StepOrder(
        tables=tables,
        spans=spans,
        num_whole=num_whole,
        slots=slots,
        names=tuple(_with_hashes(named, hashes)),
        forgotten=forgotten,
    )


def pack_hello(hello: Hello) -> bytes:
    """Packs what a model rank says first."""
    shape, name = hello.geometry, hello.replica.encode()
    fixed = (shape.num_layers, shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.itemsize)
    packed = _GEOMETRY.pack(*fixed, shape.num_blocks, shape.width, shape.q_first, shape.scale)
    numbers = array("q", [hello.rank, hello.epoch, hello.resumes, len(shape.windows)])
    numbers.extend(-1 if window is None else window for window in shape.windows)
    numbers.append(len(shape.window_of))
    numbers.extend(shape.window_of)
    return packed + _SIZES.pack(len(numbers), len(name)) + numbers.tobytes() + name


def unpack_hello(data: memoryview) -> Hello:
    """Unpacks what a model rank says first. Raises BadFrame."""
    if len(data) < _GEOMETRY.size:
        raise BadFrame("a HELLO is too short")
    layers, heads, kv_heads, head_dim, itemsize, blocks, width, q_first, scale = _GEOMETRY.unpack_from(data)
    numbers, name = _split(data[_GEOMETRY.size :])
    rank, epoch, resumes = numbers.some(3)
    windows, window_of = numbers.listed(), numbers.listed()
    geometry = Geometry(
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        itemsize=itemsize,
        num_blocks=blocks,
        width=width,
        windows=tuple(None if window < 0 else window for window in windows),
        window_of=window_of,
        scale=scale,
        q_first=q_first,
    )
    if not _is_possible(geometry):
        raise BadFrame(f"a HELLO has impossible sizes: {geometry}")
    return Hello(
        replica=name.decode(errors="replace"), rank=rank, epoch=epoch, resumes=bool(resumes), geometry=geometry
    )


def pack_welcome(*, resumed: bool, last_complete: int, names: Mapping[int, tuple[bytes, int]]) -> bytes:
    """Packs what the worker says where it takes a session."""
    numbers = array("q", [resumed, last_complete, len(names)])
    for block, (text_hash, number) in names.items():
        numbers.extend((block, len(text_hash), number))
    hashes = b"".join(text_hash for text_hash, _ in names.values())
    return _SIZES.pack(len(numbers), len(hashes)) + numbers.tobytes() + hashes


def unpack_welcome(data: memoryview) -> tuple[bool, int, dict[int, tuple[bytes, int]]]:
    """Unpacks it. Raises BadFrame."""
    numbers, hashes = _split(data)
    resumed, last_complete = numbers.some(2)
    told = numbers.times(lambda: numbers.some(3))
    texts = _with_hashes([(block, length) for block, length, _ in told], hashes)
    names = {block: (text, number) for (block, text), (_, _, number) in zip(texts, told, strict=True)}
    return bool(resumed), last_complete, names


def _is_possible(shape: Geometry) -> bool:
    sizes = (shape.num_layers, shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.num_blocks, shape.width)
    return (
        all(sizes)
        and shape.num_heads % shape.num_kv_heads == 0
        and shape.itemsize in (2, 4)
        and len(shape.window_of) == shape.num_layers
        and all(0 <= place < len(shape.windows) for place in shape.window_of)
    )


def _split(data: bytes | memoryview) -> tuple[_Numbers, bytes]:
    """Returns the numbers and the bytes behind them."""
    if len(data) < _SIZES.size:
        raise BadFrame("a message is too short")
    count, num_bytes = _SIZES.unpack_from(data)
    end = _SIZES.size + 8 * count
    if count > _MOST_NUMBERS or len(data) != end + num_bytes:
        raise BadFrame("a message has not the length that it says")
    numbers = array("q")
    numbers.frombytes(data[_SIZES.size : end])
    return _Numbers(numbers), bytes(data[end:])


def _with_hashes(
    lengths: "tuple[tuple[int, int], ...] | list[tuple[int, int]]", hashes: bytes
) -> Iterator[tuple[int, bytes]]:
    ends = [0]
    for _, length in lengths:
        if length < 0:
            raise BadFrame("a hash has a negative length")
        ends.append(ends[-1] + length)
    if ends[-1] != len(hashes):
        raise BadFrame("the hashes of a message have another length")
    for (block, _), (start, end) in zip(lengths, pairwise(ends), strict=True):
        yield block, hashes[start:end]


def _delta_numbers(delta: Delta) -> list[int]:
    match delta:
        case Begun():
            parent = -1 if delta.parent is None else delta.parent
            return [0, delta.sequence, parent, delta.num_shared, len(delta.blocks), *delta.blocks]
        case Moved():
            return [1, delta.sequence, len(delta.blocks), *chain.from_iterable(delta.blocks)]
        case Cut():
            return [2, delta.sequence, delta.num_blocks]
        case Appended():
            return [3, delta.sequence, len(delta.blocks), *delta.blocks]
        case Freed():
            return [4, delta.sequence]


def _read_delta(numbers: _Numbers) -> Delta:
    kind, sequence = numbers.some(2)
    match kind:
        case 0:
            parent, num_shared = numbers.some(2)
            return Begun(
                sequence=sequence,
                parent=None if parent < 0 else parent,
                num_shared=num_shared,
                blocks=numbers.listed(),
            )
        case 1:
            return Moved(sequence=sequence, blocks=numbers.pairs())
        case 2:
            return Cut(sequence=sequence, num_blocks=numbers.one())
        case 3:
            return Appended(sequence=sequence, blocks=numbers.listed())
        case 4:
            return Freed(sequence=sequence)
    raise BadFrame(f"there is no delta of kind {kind}")


def _read_span(numbers: _Numbers) -> QuerySpan:
    sequence, num_queries, num_new = numbers.some(3)
    seen: tuple[Seen, ...] = numbers.times(numbers.pairs)
    return QuerySpan(sequence=sequence, num_queries=num_queries, num_new=num_new, seen=seen)
