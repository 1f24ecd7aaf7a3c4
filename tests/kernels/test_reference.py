"""The reference operations against transformers' modules or the formula written out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

import kernels
from kernels import cpu, reference
from kernels.attention import LayerCache
from kernels.select import kernels_for


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_that_of_transformers(dtype: torch.dtype) -> None:
    x, weight = torch.randn(7, 33).to(dtype), torch.randn(33).to(dtype)
    norm = LlamaRMSNorm(33, eps=1e-5)
    norm.weight.data = weight
    torch.testing.assert_close(reference.rms_norm(x, weight, 1e-5), norm(x).detach(), atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [10, 64])
@pytest.mark.parametrize("scaled", [False, True])
def test_rope_is_that_of_transformers(dtype: torch.dtype, head_dim: int, scaled: bool) -> None:
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    }
    rope = (
        {"rope_type": "llama3", "rope_theta": 5e5, **scaling} if scaled else {"rope_type": "default", "rope_theta": 5e5}
    )
    embedding = LlamaRotaryEmbedding(LlamaConfig(head_dim=head_dim, rope_parameters=rope))
    positions = torch.tensor([0, 1, 2, 77, 500, 100_000])
    query = torch.randn(6, 3, head_dim).to(dtype)
    cos, sin = embedding(query, positions[None])
    expected, _ = apply_rotary_pos_emb(query.transpose(0, 1)[None], query.transpose(0, 1)[None], cos, sin)

    frequencies = reference.rope_frequencies(head_dim, 5e5)
    if scaled:
        frequencies = reference.scale_llama3(
            frequencies, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_tokens=256
        )
    torch.testing.assert_close(frequencies, embedding.inv_freq, atol=0, rtol=1e-6)
    got = reference.rotate(query, *reference.rope_tables(positions, frequencies, dtype))
    # At position 100 000 a frequency one rounding apart is an angle 0.01 apart.
    tolerance = 2e-2 if scaled or dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(got, expected[0].transpose(0, 1), atol=tolerance, rtol=tolerance)


def test_silu_mul_multiplies_the_halves() -> None:
    gate, up = torch.randn(5, 9), torch.randn(5, 9)
    expected = gate / (1 + torch.exp(-gate)) * up
    torch.testing.assert_close(reference.silu_mul(torch.cat((gate, up), dim=-1)), expected)


def test_embedding_takes_rows() -> None:
    table = torch.randn(11, 4)
    assert torch.equal(reference.embedding(torch.tensor([3, 10, 3]), table), table[[3, 10, 3]])


def test_write_kv_touches_its_slots_only() -> None:
    cache = LayerCache(keys=torch.zeros(2, 10, 4), values=torch.zeros(2, 10, 4))
    keys, values = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    reference.write_kv(cache, torch.tensor([7, 0, 3]), keys, values)
    for stored, given_ in ((cache.keys, keys), (cache.values, values)):
        assert torch.equal(stored[:, [7, 0, 3]], given_.transpose(0, 1))
        assert not stored[:, [1, 2, 4, 5, 6, 8, 9]].any()


@settings(deadline=None, max_examples=60)
@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=5), seed=st.integers(0, 1000))
def test_merged_parts_are_the_whole(sizes: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = 20 * torch.randn(3, sum(sizes), generator=generator)  # so far apart that a naive exponential overflows
    scores[0] += 200
    values = torch.randn(sum(sizes), 8, generator=generator)
    parts = [
        (part.softmax(-1) @ rows, part.logsumexp(-1))
        for part, rows in zip(scores.split(sizes, dim=1), values.split(sizes), strict=True)
    ]
    output, mass = reference.merge_partials([out for out, _ in parts], [mass for _, mass in parts])
    torch.testing.assert_close(output, scores.softmax(-1) @ values, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mass, scores.logsumexp(-1))


def test_a_part_of_no_mass_changes_nothing() -> None:
    out = torch.randn(3, 8)
    merged, _ = reference.merge_partials([out, torch.ones(3, 8)], [torch.zeros(3), torch.full((3,), -torch.inf)])
    torch.testing.assert_close(merged, out)


def test_only_a_cpu_runs_the_cpu_variant() -> None:
    assert kernels_for("cpu") is cpu
    assert kernels_for("cuda") is reference


def test_the_package_does_not_look_like_the_one_transformers_probes_for() -> None:
    assert kernels.__version__ == "0.0.0"
    assert not hasattr(kernels, "get_kernel")
