"""Replicas of several shapes whose ranks are in this process: real caches, threads and sockets, and no model."""

import queue
import random
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kernels.attention import LayerCache, Run
from placement.model.part import Part, Span
from placement.model.specs import DType
from placement.model.striping import Stripe
from placement.serving.kv.peers import KvFormat, ReplicaRanks, Shipment, new_transfer_id
from placement.serving.kv.runs import block_runs
from workers.host.device import TORCH_DTYPES
from workers.kv_transfer.awaited import Expected
from workers.kv_transfer.receiver import KvReceiver
from workers.kv_transfer.sender import KvSender, Target
from workers.model.kv_cache import KVCache
from workers.model.progress import LayerProgress
from workers.transport.mesh import listen

NUM_LAYERS, NUM_HEADS, DIM = 3, 4, 8
SOURCE_EPOCH, TARGET_EPOCH = 7, 9
WAIT_S = 60.0
"""No test waits for so long, unless something is broken."""

Address = tuple[str, int]


def part(layers: tuple[int, int], heads: tuple[int, int], stripe: Stripe | None = None) -> Part:
    nothing = Span(0, 0)
    return Part(layers=Span(*layers), kv_heads=Span(*heads), ffn_columns=nothing, vocab_rows=nothing, stripe=stripe)


def shape(name: str, block_size: int) -> tuple[Part, ...]:
    """The parts of a replica's ranks."""
    third = block_size // 3
    every = (0, NUM_LAYERS), (0, NUM_HEADS)
    shapes = {
        "whole": [part(*every)],
        "uneven": [part((0, NUM_LAYERS), (0, 3)), part((0, NUM_LAYERS), (3, 4))],
        "stages": [part((0, 2), (0, NUM_HEADS)), part((2, 3), (0, NUM_HEADS))],
        "stripes": [part(*every, Stripe(0, third, block_size)), part(*every, Stripe(third, block_size, block_size))],
        "copies": [part((0, NUM_LAYERS), heads) for heads in ((0, 2), (0, 2), (2, 4), (4, 4))],
    }
    return tuple(shapes[name])


SHAPES = ("whole", "uneven", "stages", "stripes", "copies")


@dataclass(frozen=True)
class Kind:
    """What a replica is like."""

    shape: str = "whole"
    block_size: int = 4
    dtype: DType = DType.FLOAT32


def dense_kv(num_tokens: int, seed: int = 0) -> Tensor:
    """The keys and values [layers, 2, heads, tokens, dims] of a sequence; all are unlike each other and not zero."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn((NUM_LAYERS, 2, NUM_HEADS, num_tokens, DIM), generator=generator)
    return torch.where(numbers.abs() < 1e-3, torch.ones(()), numbers)


@dataclass
class Replica:
    """The caches of a replica's ranks, and where they have one sequence."""

    ranks: ReplicaRanks
    num_tokens: int
    caches: list[KVCache] = field(init=False)
    table: list[int] = field(init=False)

    def __post_init__(self) -> None:
        size = self.ranks.block_size
        needed = -(-self.num_tokens // size)
        self.num_blocks = needed + 3
        self.table = random.Random(self.num_tokens + size).sample(range(self.num_blocks), needed)
        self.caches = [self._cache(it) for it in self.ranks.parts]

    def _cache(self, it: Part) -> KVCache:
        width = self.ranks.block_size if it.stripe is None else it.stripe.width
        dims = (len(it.kv_heads), self.num_blocks * width, DIM)
        dtype = TORCH_DTYPES[self.ranks.dtype]
        layers = [
            LayerCache(keys=torch.zeros(dims, dtype=dtype), values=torch.zeros(dims, dtype=dtype))
            for _ in layers_of(it)
        ]
        return KVCache(layers=tuple(layers))

    def runs(self, stop: int) -> tuple[Run, ...]:
        return block_runs(self.table, self.ranks.block_size, stop)

    def _slots(self, it: Part) -> Iterator[tuple[int, int]]:
        """The position of each token that a rank holds and its slot in the rank's cache, by the definition."""
        size = self.ranks.block_size
        stripe = it.stripe or Stripe(0, size, size)
        for position in range(self.num_tokens):
            offset = position % size
            if stripe.start <= offset < stripe.stop:
                yield position, self.table[position // size] * stripe.width + offset - stripe.start

    def fill(self, dense: Tensor, layers: Sequence[int] = range(NUM_LAYERS)) -> None:
        """Writes layers of a sequence to all caches."""
        for it, cache in zip(self.ranks.parts, self.caches, strict=True):
            for layer in set(layers) & set(layers_of(it)):
                own = cache.layers[layer - it.layers.start]
                for position, slot in self._slots(it):
                    heads = slice(it.kv_heads.start, it.kv_heads.stop)
                    own.keys[:, slot] = dense[layer, 0, heads, position].to(own.keys.dtype)
                    own.values[:, slot] = dense[layer, 1, heads, position].to(own.values.dtype)

    def copy(self) -> list[Tensor]:
        """All that the caches have."""
        return [tensor.clone() for cache in self.caches for it in cache.layers for tensor in (it.keys, it.values)]


def layers_of(it: Part) -> range:
    return range(it.layers.start, it.layers.stop)


def incarnation(number: int) -> bytes:
    return number.to_bytes(16, "little")


def ranks(kind: Kind, epoch: int, addresses: Sequence[Address]) -> ReplicaRanks:
    return ReplicaRanks(
        epoch=epoch,
        incarnation=incarnation(epoch),
        parts=shape(kind.shape, kind.block_size),
        addresses=tuple(addresses),
        dtype=kind.dtype,
        block_size=kind.block_size,
    )


End = tuple[int, bytes, str, int]


class Pair:
    """Two replicas, one of which sends the other a sequence."""

    def __init__(self, source: Kind, target: Kind, num_tokens: int, shared_memory: bool) -> None:
        self.listeners = [listen("127.0.0.1") for _ in shape(target.shape, target.block_size)]
        self.addresses: list[Address] = [listener.getsockname()[:2] for listener in self.listeners]
        num_sources = len(shape(source.shape, source.block_size))
        self.source = Replica(ranks(source, SOURCE_EPOCH, [("127.0.0.1", 1)] * num_sources), num_tokens)
        self.target = Replica(ranks(target, TARGET_EPOCH, self.addresses), num_tokens)
        self.ends: queue.Queue[End] = queue.Queue()
        self.drops: queue.Queue[tuple[bytes, str]] = queue.Queue()
        self.receivers = [self._receiver(rank, shared_memory) for rank in range(len(self.listeners))]
        self.senders = [self._sender(rank) for rank in range(num_sources)]

    def _sender(self, rank: int) -> KvSender:
        return KvSender(
            epoch=SOURCE_EPOCH,
            rank=rank,
            own=self.source.ranks,
            cache=self.source.caches[rank],
            head_dim=DIM,
            on_drop=lambda transfer, problem: self.drops.put((transfer, problem)),
        )

    def _receiver(self, rank: int, shared_memory: bool) -> KvReceiver:
        return KvReceiver(
            listener=self.listeners[rank],
            epoch=TARGET_EPOCH,
            rank=rank,
            own=self.target.ranks,
            cache=self.target.caches[rank],
            head_dim=DIM,
            on_end=lambda transfer, problem, num: self.ends.put((rank, transfer, problem, num)),
            shared_memory=shared_memory,
        )

    def expect(self, tokens: Span, kv_format: KvFormat = KvFormat.NATIVE) -> bytes:
        """Has all target ranks await a transfer."""
        transfer_id = new_transfer_id()
        expected = Expected(
            transfer_id=transfer_id,
            source=self.source.ranks,
            tokens=tokens,
            runs=self.target.runs(tokens.stop),
            format=kv_format,
        )
        for receiver in self.receivers:
            receiver.expect(expected)
        return transfer_id

    def open(
        self,
        transfer_id: bytes,
        tokens: Span,
        kv_format: KvFormat = KvFormat.NATIVE,
        addresses: Sequence[Address] | None = None,
    ) -> None:
        """Opens a transfer at all source ranks."""
        there = replace(self.target.ranks, addresses=tuple(addresses or self.addresses))
        for sender in self.senders:
            sender.open(Target(transfer_id=transfer_id, ranks=there, tokens=tokens, format=kv_format))

    def ship(self, transfer_id: bytes, tokens: Span, progress: LayerProgress | None = None) -> None:
        """Ships a portion of all source ranks, which is computed unless ``progress`` says how far it is."""
        for sender in self.senders:
            shipment = Shipment(transfer_id=transfer_id, tokens=tokens)
            sender.ship(shipment, self.source.runs(tokens.stop), progress or computed())

    def outcomes(self) -> list[End]:
        """Waits until the transfer has ended at all target ranks."""
        return sorted(self.ends.get(timeout=WAIT_S) for _ in self.receivers)

    def stop(self) -> None:
        for sender in self.senders:
            sender.stop()
        for receiver in self.receivers:
            receiver.stop()
        for listener in self.listeners:
            listener.close()


@contextmanager
def pair(
    source: Kind | None = None, target: Kind | None = None, *, num_tokens: int = 21, shared_memory: bool = False
) -> Iterator[Pair]:
    made = Pair(source or Kind(), target or Kind(), num_tokens, shared_memory)
    try:
        for receiver in made.receivers:
            receiver.start()
        yield made
    finally:
        made.stop()


def computed() -> LayerProgress:
    progress = LayerProgress()
    progress.finish()
    return progress


def wait_until(condition: Callable[[], object]) -> None:
    """Waits until a function says yes."""
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, "it never came about"
        time.sleep(0.005)


def is_closed(sock: socket.socket) -> bool:
    """Waits for the other end to close, whatever it says before."""
    sock.settimeout(WAIT_S)
    try:
        while sock.recv(4096):
            pass
    except ConnectionError:
        pass
    return True
