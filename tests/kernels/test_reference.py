"""The reference operations against transformers' modules or the formula written out."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

import kernels
from kernels import reference
from kernels.attention import LayerCache
from kernels.cpu import variant as cpu
from kernels.select import kernels_for

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256}
YARN = {"factor": 8.0, "original_max_position_embeddings": 256}


@DTYPES
def test_rms_norm_is_that_of_transformers(dtype: torch.dtype) -> None:
    x, weight = torch.randn(7, 33).to(dtype), torch.randn(33).to(dtype)
    norm = LlamaRMSNorm(33, eps=1e-5)
    norm.weight.data = weight
    torch.testing.assert_close(reference.rms_norm(x, weight, 1e-5), norm(x).detach(), atol=0, rtol=0)


@DTYPES
def test_rms_norm_by_a_wider_weight_is_that_of_gemma(dtype: torch.dtype) -> None:
    x, weight = torch.randn(7, 33).to(dtype), torch.randn(33).to(dtype)
    norm = GemmaRMSNorm(33, eps=1e-5)
    norm.weight.data = weight
    got = reference.rms_norm(x, 1.0 + weight.float(), 1e-5)
    torch.testing.assert_close(got, norm(x).detach(), atol=0, rtol=0)


@DTYPES
def test_rms_norm_norms_each_head_by_its_own_weight(dtype: torch.dtype) -> None:
    heads, weight = torch.randn(7, 5, 8).to(dtype), torch.randn(3, 8).to(dtype)
    got = reference.rms_norm(heads[:, :3], weight, 1e-5)
    expected = [reference.rms_norm(heads[:, head], weight[head], 1e-5) for head in range(3)]
    torch.testing.assert_close(got, torch.stack(expected, dim=1), atol=0, rtol=0)


@DTYPES
def test_add_rms_norm_adds_and_norms(dtype: torch.dtype) -> None:
    update, residual, weight = (torch.randn(shape).to(dtype) for shape in ((7, 33), (7, 33), (33,)))
    expected = residual + update
    normed, total = reference.add_rms_norm(update.clone(), residual.clone(), weight, 1e-5)
    torch.testing.assert_close(total, expected, atol=0, rtol=0)
    torch.testing.assert_close(normed, reference.rms_norm(expected, weight, 1e-5), atol=0, rtol=0)


def scaled(kind: str, frequencies: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    if kind == "llama3":
        return reference.scale_llama3(
            frequencies, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_tokens=256
        )
    if kind == "yarn":
        given = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True} | options
        return reference.scale_yarn(frequencies, theta=5e5, factor=8.0, original_max_tokens=256, **given)
    return frequencies


@DTYPES
@pytest.mark.parametrize("head_dim", [10, 64])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("default", {}),
        ("llama3", {}),
        ("yarn", {}),
        ("yarn", {"beta_fast": 8.0, "beta_slow": 2.0, "truncate": False}),
        ("yarn", {"beta_fast": 4.0, "beta_slow": 4.0, "truncate": False}),
    ],
)
def test_rope_is_that_of_transformers(dtype: torch.dtype, head_dim: int, kind: str, options: dict[str, Any]) -> None:
    sizes = {"default": {}, "llama3": LLAMA3, "yarn": YARN}[kind]
    rope = {"rope_type": kind, "rope_theta": 5e5, **sizes, **options}
    embedding = LlamaRotaryEmbedding(LlamaConfig(head_dim=head_dim, rope_parameters=rope))
    positions = torch.tensor([0, 1, 2, 77, 500, 100_000])
    query = torch.randn(6, 3, head_dim).to(dtype)
    cos, sin = embedding(query, positions[None])
    expected, _ = apply_rotary_pos_emb(query.transpose(0, 1)[None], query.transpose(0, 1)[None], cos, sin)

    frequencies = scaled(kind, reference.rope_frequencies(head_dim, 5e5), options)
    torch.testing.assert_close(frequencies, embedding.inv_freq, atol=0, rtol=1e-6)
    tables = reference.rope_tables(positions, frequencies, dtype, embedding.attention_scaling)
    # At position 100 000 a frequency one rounding apart is an angle 0.01 apart.
    tolerance = 2e-2 if kind != "default" or dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(
        reference.rotate(query, *tables), expected[0].transpose(0, 1), atol=tolerance, rtol=tolerance
    )


@DTYPES
def test_gelu_mul_is_that_of_gemma(dtype: torch.dtype) -> None:
    gate, up = torch.randn(2, 5, 9).to(dtype)
    expected = ACT2FN["gelu_pytorch_tanh"](gate) * up
    got = reference.gelu_mul(torch.cat((gate, up), dim=-1))
    torch.testing.assert_close(got, expected)


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


def test_the_package_does_not_look_like_the_one_transformers_probes_for() -> None:
    assert kernels.__version__ == "0.0.0"
    assert not hasattr(kernels, "get_kernel")
