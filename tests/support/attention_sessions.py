"""Attention workers in this process, sessions with them over loopback, and model ranks that are made of random rows."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kernels.reference import merge_partials
from placement.serving.offload.deltas import deltas
from placement.serving.offload.orders import Geometry, QuerySpan, StepOrder
from workers.attention_worker.client import RemoteSession, connect
from workers.attention_worker.worker import AttentionWorker
from workers.transport.mesh import listen

SECRET = b"s" * 32
BLOCK_SIZE = 4
DEADLINE_S = 30.0
_opened: list[RemoteSession] = []


@contextmanager
def attention_worker(**fields: Any) -> Iterator[tuple[AttentionWorker, tuple[str, int]]]:
    """Runs an attention worker, and says where it listens. Sessions that were opened meanwhile are closed."""
    base = {"secret": SECRET, "kv_cache_bytes": 64 << 20, "device": torch.device("cpu")}
    with listen("127.0.0.1") as listener:
        worker = AttentionWorker(listener, **base | fields)
        worker.thread.start()
        try:
            yield worker, listener.getsockname()[:2]
        finally:
            while _opened:
                _opened.pop().close()
            worker.stop()
            worker.ended.result(DEADLINE_S)


def geometry_of(**fields: Any) -> Geometry:
    """The sizes of a small session."""
    base: dict[str, Any] = {
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "itemsize": 4,
        "num_blocks": 64,
        "width": BLOCK_SIZE,
        "windows": (None,),
        "window_of": (0, 0),
        "scale": 0.25,
        "q_first": True,
    }
    return Geometry(**base | fields)


def open_session(address: tuple[str, int], geometry: Geometry | None = None, **fields: Any) -> RemoteSession:
    """Opens a session."""
    base: dict[str, Any] = {
        "name": "box",
        "worker": 0,
        "epoch": 1,
        "secret": SECRET,
        "replica": "replica-0",
        "rank": 0,
        "geometry": geometry or geometry_of(),
        "resumes": False,
        "deadline_s": time.monotonic() + DEADLINE_S,
    }
    _opened.append(connect(address, **base | fields))
    return _opened[-1]


@dataclass(kw_only=True)
class Holding:
    """What a worker holds: heads of the model, slots of each block, and places of blocks in each sequence."""

    session: RemoteSession
    heads: range
    slots: range = range(BLOCK_SIZE)
    places: range = range(1 << 20)
    tables: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def holds(self, position: int) -> bool:
        return position % BLOCK_SIZE in self.slots and position // BLOCK_SIZE in self.places

    def slot(self, blocks: tuple[int, ...], position: int) -> int:
        return blocks[position // BLOCK_SIZE] * len(self.slots) + position % BLOCK_SIZE - self.slots.start


class RandomRank:
    """A model rank with random queries, keys and values, which knows what dense attention would be."""

    def __init__(self, holdings: list[Holding], *, num_kv_heads: int, group: int, seed: int = 0) -> None:
        self.holdings = holdings
        shape = holdings[0].session.geometry
        self.shape, self.group, self.num_kv_heads = shape, group, num_kv_heads
        self.dtype = torch.float32 if shape.itemsize == 4 else torch.bfloat16
        self.random = torch.Generator().manual_seed(seed)
        self.lengths: dict[int, int] = {}
        self.tables: dict[int, tuple[int, ...]] = {}
        none = torch.empty(0, num_kv_heads, shape.head_dim)
        self._none = (none, none)
        self.kv: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def rows(self, count: int, heads: int) -> Tensor:
        return torch.randn(count, heads, self.shape.head_dim, generator=self.random).to(self.dtype)

    def fork(self, parent: int, child: int, table: tuple[int, ...]) -> None:
        """Begins a sequence that has the text of another one."""
        self.lengths[child], self.tables[child] = self.lengths[parent], table
        for layer in range(self.shape.num_layers):
            self.kv[child, layer] = self.kv[parent, layer]

    def order(self, holding: Holding, chunks: dict[int, int]) -> StepOrder:
        """The order for one worker, where the sequences have grown by their chunks already."""
        after = {
            sequence: tuple(b for place, b in enumerate(table) if place in holding.places)
            for sequence, table in self.tables.items()
        }
        spans, slots = [], []
        for sequence, count in chunks.items():
            length = self.lengths[sequence]
            held = [p for p in range(length) if holding.holds(p)]
            new = [p for p in held if p >= length - count]
            seen = tuple(
                tuple(
                    (sum(p < (0 if window is None else t - window + 1) for p in held), sum(p <= t for p in held))
                    for t in range(length - count, length)
                )
                for window in self.shape.windows
            )
            spans.append(QuerySpan(sequence=sequence, num_queries=count, num_new=len(new), seen=seen))
            slots += [holding.slot(self.tables[sequence], p) for p in new]
        is_all = len(holding.slots) == BLOCK_SIZE and len(holding.places) > 1 << 10
        told = deltas(holding.tables, after)
        holding.tables = after
        num_whole = sum(chunks.values()) if is_all else 0
        return StepOrder(tables=told, spans=tuple(spans), num_whole=num_whole, slots=tuple(slots))

    def step(self, chunks: dict[int, int]) -> list[tuple[Tensor, Tensor]]:
        """Computes a step: for each layer what the workers found, and what dense attention finds."""
        for sequence, count in chunks.items():
            self.lengths[sequence] = self.lengths.get(sequence, 0) + count
        orders = [self.order(holding, chunks) for holding in self.holdings]
        numbers = [h.session.order(order) for h, order in zip(self.holdings, orders, strict=True)]
        return [self._layer(layer, chunks, numbers) for layer in range(self.shape.num_layers)]

    def _layer(self, layer: int, chunks: dict[int, int], numbers: list[int]) -> tuple[Tensor, Tensor]:
        count = sum(chunks.values())
        query = self.rows(count, self.num_kv_heads * self.group)
        keys, values = self.rows(count, self.num_kv_heads), self.rows(count, self.num_kv_heads)
        positions, first = [], 0
        for sequence, rows in chunks.items():
            old = self.kv.get((sequence, layer), self._none)
            new = keys[first : first + rows], values[first : first + rows]
            self.kv[sequence, layer] = (torch.cat([old[0], new[0]]), torch.cat([old[1], new[1]]))
            positions += range(self.lengths[sequence] - rows, self.lengths[sequence])
            first += rows
        found = []
        for holding, number in zip(self.holdings, numbers, strict=True):
            own = [row for row, position in enumerate(positions) if holding.holds(position)]
            kv = slice(holding.heads.start, holding.heads.stop)
            sent = (keys[own, kv], values[own, kv]) if own else (None, None)
            holding.session.send(number, layer, query[:, self._heads(holding)], *sent)
        for holding, number in zip(self.holdings, numbers, strict=True):
            result = holding.session.result(number, layer)
            mass = torch.cat([torch.zeros(result.whole.shape[:2]), result.mass])
            found.append((holding, torch.cat([result.whole.float(), result.parts]), mass))
        return self._merge(found, query.shape), self._dense(layer, chunks, query)

    def _heads(self, holding: Holding) -> slice:
        return slice(holding.heads.start * self.group, holding.heads.stop * self.group)

    def _merge(self, found: list[tuple[Holding, Tensor, Tensor]], shape: torch.Size) -> Tensor:
        output = torch.empty(shape)
        for heads in {holding.heads for holding, _, _ in found}:
            same = [(holding, out, mass) for holding, out, mass in found if holding.heads == heads]
            merged, _ = merge_partials([out for _, out, _ in same], [mass for _, _, mass in same])
            output[:, self._heads(same[0][0])] = merged
        return output

    def _dense(self, layer: int, chunks: dict[int, int], query: Tensor) -> Tensor:
        window = self.shape.windows[self.shape.window_of[layer]]
        output, row = torch.empty(query.shape), 0
        for sequence, count in chunks.items():
            keys, values = (t.double().repeat_interleave(self.group, dim=1) for t in self.kv[sequence, layer])
            for position in range(self.lengths[sequence] - count, self.lengths[sequence]):
                first = 0 if window is None else max(0, position - window + 1)
                seen = slice(first, position + 1)
                scores = torch.einsum("hd,shd->hs", query[row].double(), keys[seen]) * self.shape.scale
                output[row] = torch.einsum("hs,shd->hd", scores.softmax(dim=-1), values[seen]).float()
                row += 1
        return output
