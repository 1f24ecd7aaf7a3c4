"""Single kernels in the shapes of Llama 3 8 B, with the bytes or operations that each cannot do without."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from kernels import reference
from kernels.attention import LayerCache, Run, SequenceSpan
from kernels.cuda.plan import PART, SharedParts, plan_step
from kernels.cuda.quantized import TiledLinear
from kernels.cuda.variant import open_kernels
from kernels.rounded import round_weight
from tests.support.triton.triton_cases import DEVICE, normal

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
    shared: tuple[tuple[int, int, int], ...] = ((64, 4096, 256), (64, 16384, 256))  # members, tokens shared, and own
    linear_rows: int = 2048
    rounded: tuple[int, ...] = (1, 16, 64, 256, 2048)  # tokens
    group_size: int = 128

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


SMALL = Sizes(
    hidden=64,
    heads=4,
    kv_heads=2,
    ffn=96,
    rows=3,
    decodes=((2, 320),),
    chunks=(20,),
    shared=((2, 256, 16),),
    linear_rows=4,
    rounded=(2,),
    group_size=32,
)


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
    for shape in sizes.shared:
        yield from _shared(sizes, *shape)
    for length in sizes.chunks:
        yield _chunk(sizes, length)
    weight = normal(2 * sizes.ffn, sizes.hidden, dtype=DTYPE)
    linear, x = KERNELS.pack(weight, None), normal(sizes.linear_rows, sizes.hidden, dtype=DTYPE)
    yield Load(name="linear", bound_by="flops", amount=2 * x.numel() * 2 * sizes.ffn, call=lambda: linear(x))
    for num_outputs, num_inputs in ((2 * sizes.ffn, sizes.hidden), (sizes.hidden, sizes.hidden)):
        yield from _rounded(sizes, num_outputs, num_inputs)


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
    runs, per = _blocks(num_sequences * length), length // BLOCK
    tables = [runs[i * per : (i + 1) * per] for i in range(num_sequences)]
    plan = KERNELS.plan(
        [SequenceSpan(query_start=i, num_queries=1, runs=tuple(table)) for i, table in enumerate(tables)]
    )
    query = normal(num_sequences, sizes.heads, sizes.head_dim, dtype=DTYPE)
    keys = query[:, : sizes.kv_heads]
    return _moves(
        f"decode_attention_{num_sequences}x{length}",
        cache.keys.nbytes + cache.values.nbytes + 2 * query.nbytes,
        lambda: KERNELS.attention(query, keys, keys, cache, plan, sizes.head_dim**-0.5),
    )


def _shared(sizes: Sizes, num_members: int, num_shared: int, num_own: int) -> Iterator[Load]:
    """Decodes that share tokens, attended to once for all and by each for itself; what is counted is read once."""
    num_tokens = num_shared + num_members * num_own
    cache, runs = _cache(sizes, num_tokens), _blocks(num_tokens)
    shared, own, per = tuple(runs[: num_shared // BLOCK]), runs[num_shared // BLOCK :], num_own // BLOCK
    spans = [
        SequenceSpan(query_start=i, num_queries=1, runs=(*shared, *own[i * per : (i + 1) * per]))
        for i in range(num_members)
    ]
    common = SharedParts(members=tuple(range(num_members)), first=0, stop=num_shared // PART)
    query = normal(num_members, sizes.heads, sizes.head_dim, dtype=DTYPE)
    for name, offered in (("shared", (common,)), ("unshared", ())):
        plan = plan_step(spans, None, DEVICE, offered)
        yield _moves(
            f"{name}_attention_{num_members}x{num_shared}",
            cache.keys.nbytes + cache.values.nbytes + 2 * query.nbytes,
            partial(KERNELS.attention, query, query, query, cache, plan, sizes.head_dim**-0.5),
        )


def _rounded(sizes: Sizes, num_outputs: int, num_inputs: int) -> Iterator[Load]:
    """Products with rounded weights: few tokens are bound by reading the codes, many by multiplying."""
    weight = normal(num_outputs, num_inputs, dtype=DTYPE)
    for bits in (4, 8):
        linear = TiledLinear(round_weight(weight, bits=bits, group_size=sizes.group_size), None)
        for num_tokens in sizes.rounded:
            x = normal(num_tokens, num_inputs, dtype=DTYPE)
            name, call = f"int{bits}_linear_{num_outputs}x{num_inputs}_{num_tokens}", partial(linear, x)
            if num_tokens > 64:
                flops = 2 * num_tokens * num_inputs * num_outputs
                yield Load(name=name, bound_by="flops", amount=flops, call=call)
            else:
                yield _moves(name, linear.num_bytes + x.nbytes + num_tokens * num_outputs * DTYPE.itemsize, call)


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


def _blocks(num_slots: int) -> list[Run]:
    """All blocks of so many slots, in no order."""
    blocks = random.Random(1).sample(range(num_slots // BLOCK), num_slots // BLOCK)
    return [(block * BLOCK, (block + 1) * BLOCK) for block in blocks]


def _cache(sizes: Sizes, num_slots: int) -> LayerCache:
    keys, values = (torch.randn(sizes.kv_heads, num_slots, sizes.head_dim, device=DEVICE, dtype=DTYPE) for _ in "kv")
    return LayerCache(keys=keys, values=values)
