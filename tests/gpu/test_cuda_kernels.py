"""Every Triton kernel against the reference, on a GPU, in the shapes of real models and in awkward ones.

The small shapes of tests/kernels/test_triton_*.py run here too, compiled.
"""

import pytest
import torch

from kernels import reference
from kernels.attention import LayerCache
from tests.kernels.cpu.test_shared_prefix import Forest, Node, prefix
from tests.support.triton.triton_cases import (
    ATTENTION_TOLERANCE,
    DEVICE,
    DTYPES,
    HAS_GPU,
    ROW_TOLERANCE,
    AttentionCase,
    attention_case,
    normal,
)

if not HAS_GPU:
    pytest.skip("torch sees no CUDA device here", allow_module_level=True)

from kernels.cuda.plan import DevicePlan
from kernels.cuda.variant import open_kernels

pytestmark = pytest.mark.gpu
KERNELS = open_kernels(DEVICE)
EPS = 1e-5
TYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = ROW_TOLERANCE[expected.dtype]
    torch.testing.assert_close(found, expected, rtol=2 * tolerance, atol=tolerance)


@TYPES
@pytest.mark.parametrize("num_tokens", [1, 17, 2048])
@pytest.mark.parametrize("width", [2048, 3584, 4096, 5120, 8192, 16384])
def test_norms_agree(dtype: torch.dtype, num_tokens: int, width: int) -> None:
    x, residual = (3 * normal(num_tokens, width, dtype=dtype, seed=seed) for seed in (0, 1))
    for weight in (normal(width, dtype=dtype, seed=2), 1 + normal(width, dtype=torch.float32, seed=2)):
        close(KERNELS.rms_norm(x, weight, EPS), reference.rms_norm(x, weight, EPS))
        expected = reference.add_rms_norm(x, residual, weight, EPS)
        for found, wanted in zip(KERNELS.add_rms_norm(x, residual.clone(), weight, EPS), expected, strict=True):
            close(found, wanted)


@TYPES
@pytest.mark.parametrize("num_tokens", [1, 33, 2048])
@pytest.mark.parametrize("width", [5632, 14336, 18944])
def test_gated_activations_agree(dtype: torch.dtype, num_tokens: int, width: int) -> None:
    gate_up = 4 * normal(num_tokens, 2 * width, dtype=dtype)
    close(KERNELS.silu_mul(gate_up), reference.silu_mul(gate_up))
    close(KERNELS.gelu_mul(gate_up), reference.gelu_mul(gate_up))


@TYPES
@pytest.mark.parametrize("num_tokens", [1, 300])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(32, 8, 128), (32, 4, 64), (15, 5, 80), (8, 1, 256)])
def test_rope_head_norms_and_kv_writes_agree(
    dtype: torch.dtype, num_tokens: int, heads: int, kv_heads: int, head_dim: int
) -> None:
    fused = normal(num_tokens, heads + 2 * kv_heads, head_dim, dtype=dtype)
    turned, values = fused[:, :-kv_heads], fused[:, -kv_heads:]
    weight = normal(heads + kv_heads, head_dim, dtype=dtype, seed=1)
    close(KERNELS.rms_norm(turned, weight, EPS), reference.rms_norm(turned, weight, EPS))
    positions = torch.randint(100_000, (num_tokens,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    frequencies = reference.rope_frequencies(head_dim, 5e5).to(DEVICE)
    tables = reference.rope_tables(positions, frequencies, dtype)
    found = KERNELS.rotate(turned, *tables)
    close(found, reference.rotate(turned, *tables))
    slots = torch.randperm(5000, generator=torch.Generator().manual_seed(1))[:num_tokens].to(DEVICE)
    caches = []
    for kernels in (KERNELS, reference):
        keys_cache, values_cache = torch.zeros(2, kv_heads, 5000, head_dim, dtype=dtype, device=DEVICE)
        cache = LayerCache(keys=keys_cache, values=values_cache)
        kernels.write_kv(cache, slots, found[:, heads:], values)
        caches.append(cache)
    assert torch.equal(caches[0].keys, caches[1].keys) and torch.equal(caches[0].values, caches[1].values)


@TYPES
@pytest.mark.parametrize(
    ("num_kv_heads", "group", "head_dim"), [(8, 4, 128), (4, 8, 64), (5, 3, 80), (1, 8, 256), (2, 7, 128), (1, 71, 64)]
)
@pytest.mark.parametrize("window", [None, 1, 700, 4096])
def test_attention_agrees(dtype: torch.dtype, num_kv_heads: int, group: int, head_dim: int, window: int | None) -> None:
    lengths = [(0, 1), (1, 1), (255, 1), (256, 1), (5000, 1), (0, 300), (1000, 129), (700, 2)]
    case = attention_case(lengths, num_kv_heads=num_kv_heads, group=group, head_dim=head_dim, dtype=dtype)
    tolerance = ATTENTION_TOLERANCE[dtype]
    torch.testing.assert_close(case.attend(KERNELS, window), case.expected(window), atol=tolerance, rtol=tolerance)


@TYPES
def test_a_long_decode_among_many_agrees(dtype: torch.dtype) -> None:
    lengths = [(40_000, 1), *((17 * i, 1) for i in range(100))]  # the first in as many parts as there can be
    case = attention_case(lengths, num_kv_heads=2, group=4, head_dim=128, dtype=dtype)
    tolerance = ATTENTION_TOLERANCE[dtype]
    torch.testing.assert_close(case.attend(KERNELS), case.expected(), atol=tolerance, rtol=tolerance)


@TYPES
def test_attention_has_the_same_bits_each_time(dtype: torch.dtype) -> None:
    case = attention_case([(3000, 1), (100, 200), (9, 1)], num_kv_heads=8, group=4, head_dim=128, dtype=dtype)
    first = case.attend(KERNELS)
    assert all(torch.equal(case.attend(KERNELS), first) for _ in range(20))


@TYPES
@pytest.mark.parametrize(
    ("num_kv_heads", "group", "head_dim"), [(8, 4, 128), (4, 8, 64), (5, 3, 80), (1, 8, 256), (2, 7, 128), (1, 71, 64)]
)
@pytest.mark.parametrize("num_members", [2, 16, 70])
def test_attention_to_a_shared_prefix_agrees(
    dtype: torch.dtype, num_kv_heads: int, group: int, head_dim: int, num_members: int
) -> None:
    """Two levels, and sequences that share nothing."""
    tree = Node(num_tokens=5000, children=(prefix(num_members, 700, own=300), Node(num_tokens=2)))
    roots = [tree, Node(num_tokens=900)]
    forest = Forest(roots, num_kv_heads=num_kv_heads, group=group, head_dim=head_dim, seed=num_members)
    cache = LayerCache(keys=forest.keys.to(DEVICE, dtype), values=forest.values.to(DEVICE, dtype))
    case = AttentionCase(query=forest.query.to(DEVICE, dtype), cache=cache, spans=tuple(forest.spans))
    plan = KERNELS.plan(forest.spans, shared=forest.shared)
    assert isinstance(plan, DevicePlan) and len(plan.shared)
    found = KERNELS.attention(case.query, case.query, case.query, cache, plan, head_dim**-0.5)
    tolerance = ATTENTION_TOLERANCE[dtype]
    torch.testing.assert_close(found, case.expected(), atol=tolerance, rtol=tolerance)
    assert torch.equal(KERNELS.attention(case.query, case.query, case.query, cache, plan, head_dim**-0.5), found)
