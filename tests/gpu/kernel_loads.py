"""Single kernels in the shapes of Llama 3 8 B, with the bytes or operations that each cannot do without."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from kernels import reference
from kernels.attention import LayerCache, SequenceSpan
from kernels.cuda.variant import open_kernels
from tests.support.triton_cases import DEVICE, normal

KERNELS = open_kernels(DEVICE)
BLOCK = 16
DTYPE = torch.bfloat16


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Shapes of a model and loads of a device."""

    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    ffn: int = 14336
    rows: int = 16384
    decodes: tuple[tuple[int, int], ...] = ((1, 32768), (16, 4096), (128, 2048))  # sequences, tokens of each
    chunks: tuple[int, ...] = (2048, 8192)
    linear_rows: int = 2048

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


SMALL = Sizes(hidden=64, heads=4, kv_heads=2, ffn=96, rows=3, decodes=((2, 320),), chunks=(20,), linear_rows=4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """One call, and what it must move (bytes read and written) or compute (multiplications and additions)."""

    name: str
    bound_by: Literal["bytes", "flops"]
    amount: float
    call: Callable[[], object]


def loads(sizes: Sizes) -> Iterator[Load]:
    """All of them, each made when it is asked for, so that their memory is not held together."""
    yield from _rows(sizes)
    for num_sequences, length in sizes.decodes:
        yield _decode(sizes, num_sequences, length)
    for length in sizes.chunks:
        yield _chunk(sizes, length)
    weight = normal(2 * sizes.ffn, sizes.hidden, dtype=DTYPE)
    linear, x = KERNELS.pack(weight, None), normal(sizes.linear_rows, sizes.hidden, dtype=DTYPE)
    yield Load(name="linear", bound_by="flops", amount=2 * x.numel() * 2 * sizes.ffn, call=lambda: linear(x))


def _rows(sizes: Sizes) -> Iterator[Load]:
    x, residual = (normal(sizes.rows, sizes.hidden, dtype=DTYPE, seed=seed) for seed in (0, 1))
    weight = torch.ones(sizes.hidden, dtype=DTYPE, device=DEVICE)
    yield _moves("rms_norm", 2 * x.nbytes, lambda: KERNELS.rms_norm(x, weight, 1e-5))
    yield _moves("add_rms_norm", 4 * x.nbytes, lambda: KERNELS.add_rms_norm(x, residual, weight, 1e-5))
    gate_up = normal(sizes.rows // 2, 2 * sizes.ffn, dtype=DTYPE)
    yield _moves("silu_mul", 1.5 * gate_up.nbytes, lambda: KERNELS.silu_mul(gate_up))
    heads = normal(sizes.rows, sizes.heads + 2 * sizes.kv_heads, sizes.head_dim, dtype=DTYPE)[:, : -sizes.kv_heads]
    frequencies = reference.rope_frequencies(sizes.head_dim, 5e5).to(DEVICE)
    tables = reference.rope_tables(torch.arange(sizes.rows, device=DEVICE), frequencies, DTYPE)
    moved = 2 * heads.numel() * DTYPE.itemsize + 2 * tables[0].nbytes
    yield _moves("rotate", moved, lambda: KERNELS.rotate(heads, *tables))


def _moves(name: str, num_bytes: float, call: Callable[[], object]) -> Load:
    return Load(name=name, bound_by="bytes", amount=num_bytes, call=call)


def _decode(sizes: Sizes, num_sequences: int, length: int) -> Load:
    """Decodes whose blocks lie anywhere."""
    cache = _cache(sizes, num_sequences * length)
    blocks = random.Random(1).sample(range(num_sequences * length // BLOCK), num_sequences * length // BLOCK)
    per = length // BLOCK
    tables = [blocks[i * per : (i + 1) * per] for i in range(num_sequences)]
    plan = KERNELS.plan(
        [
            SequenceSpan(query_start=i, num_queries=1, runs=tuple((b * BLOCK, (b + 1) * BLOCK) for b in table))
            for i, table in enumerate(tables)
        ]
    )
    query = normal(num_sequences, sizes.heads, sizes.head_dim, dtype=DTYPE)
    keys = query[:, : sizes.kv_heads]
    return _moves(
        f"decode_attention_{num_sequences}x{length}",
        cache.keys.nbytes + cache.values.nbytes + 2 * query.nbytes,
        lambda: KERNELS.attention(query, keys, keys, cache, plan, sizes.head_dim**-0.5),
    )


def _chunk(sizes: Sizes, length: int) -> Load:
    """A whole prompt. Only what causality leaves to be computed is counted."""
    cache = _cache(sizes, length)
    plan = KERNELS.plan([SequenceSpan(query_start=0, num_queries=length, runs=((0, length),))])
    query = normal(length, sizes.heads, sizes.head_dim, dtype=DTYPE)
    keys = query[:, : sizes.kv_heads]
    return Load(
        name=f"prefill_attention_{length}",
        bound_by="flops",
        amount=4 * sizes.hidden * length * (length + 1) / 2,
        call=lambda: KERNELS.attention(query, keys, keys, cache, plan, sizes.head_dim**-0.5),
    )


def _cache(sizes: Sizes, num_slots: int) -> LayerCache:
    keys, values = (torch.randn(sizes.kv_heads, num_slots, sizes.head_dim, device=DEVICE, dtype=DTYPE) for _ in "kv")
    return LayerCache(keys=keys, values=values)
