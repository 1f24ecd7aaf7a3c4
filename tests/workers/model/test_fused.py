"""Checks that a decoder's layers as one program give the same bits as one operation after the other."""

import dataclasses
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from kernels import reference
from kernels.attention import SharedSpan
from kernels.rounded import Bits
from kernels.select import kernels_for
from placement.model.hf import read_model_spec
from placement.model.quantization import LinearFormat
from placement.model.weights import whole_model
from workers.host.device import open_device
from workers.model.kv_cache import allocate_kv_cache
from workers.startup.checkpoint import load_weights
from workers.step.runner import ModelRunner
from workers.step.types import Batch, SequenceInput

SHAPE = {"hidden_size": 96, "intermediate_size": 160, "head_dim": 32, "num_hidden_layers": 3}
FAMILIES = {
    "llama": ("llama", {}),
    "wide heads": ("llama", {"head_dim": 64, "num_attention_heads": 6, "num_key_value_heads": 3}),
    "mistral, all layers in a window": ("mistral", {"sliding_window": 20}),
    "qwen2, with biases": ("qwen2", {"hidden_size": 128}),
    "gemma, with wide norms and GELU": ("gemma", {}),
}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def one_by_one(runner: ModelRunner) -> ModelRunner:
    """Makes the runner compute without programs."""
    assert runner._weights.fused is not None
    runner._weights = dataclasses.replace(runner._weights, fused=None)
    return runner


def batches(seed: int) -> list[Batch]:
    """Makes some 20 steps of prompts in chunks beside decodes, whose slots are scattered."""
    draw = random.Random(seed)
    pieces = [(start, start + 16) for start in range(0, 4096, 16)]
    draw.shuffle(pieces)
    sequences: dict[int, list[int]] = {i: [] for i in range(5)}
    runs = {i: tuple(pieces[i * 20 : i * 20 + 20]) for i in sequences}
    made = []
    for _ in range(20):
        chunks = []
        for i, ids in sequences.items():
            count = draw.choice([0, 1, 1, 1, 7, 40]) if ids else draw.randrange(1, 60)
            if not count or len(ids) + count > 320:
                continue
            new = [draw.randrange(3, 500) for _ in range(count)]
            chunks.append(SequenceInput(token_ids=new, start=len(ids), runs=_first(runs[i], len(ids) + count)))
            ids.extend(new)
        if chunks:
            made.append(Batch(sequences=tuple(chunks)))
    return made


def _first(runs: Sequence[tuple[int, int]], count: int) -> tuple[tuple[int, int], ...]:
    taken = []
    for start, stop in runs:
        if count <= 0:
            break
        taken.append((start, min(stop, start + count)))
        count -= stop - start
    return tuple(taken)


@pytest.mark.parametrize("num_threads", [1, pytest.param(2, marks=pytest.mark.every_target), 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_cache_have_the_same_bits(
    name: str, num_threads: int, checkpoint: Callable[..., Path], make_runner: Callable[..., ModelRunner]
) -> None:
    family, config = FAMILIES[name]
    path = checkpoint(family, **(SHAPE | config))
    fused, plain = make_runner(path, torch.bfloat16), one_by_one(make_runner(path, torch.bfloat16))
    torch.set_num_threads(num_threads)
    for batch in batches(seed=num_threads):
        assert torch.equal(fused.logits(batch), plain.logits(batch))
    for mine, other in zip(fused._cache.layers, plain._cache.layers, strict=True):
        assert torch.equal(mine.keys, other.keys) and torch.equal(mine.values, other.values)


@pytest.mark.every_target
@pytest.mark.parametrize(("family", "config"), [("qwen3", {}), ("gemma3_text", {"sliding_window": 20})])
def test_norms_of_heads_differ_from_torch_by_their_rounding_alone(
    family: str, config: dict[str, int], checkpoint: Callable[..., Path], make_runner: Callable[..., ModelRunner]
) -> None:
    path = checkpoint(family, **(SHAPE | config))
    fused, plain = make_runner(path, torch.bfloat16), one_by_one(make_runner(path, torch.bfloat16))
    for batch in batches(seed=5):
        logits, expected = fused.logits(batch), plain.logits(batch)
        torch.testing.assert_close(logits, expected, atol=0.1, rtol=0.05)
        assert (logits == expected).float().mean() > 0.5


@pytest.mark.every_target
@pytest.mark.parametrize("bits", [8, 4])
def test_rounded_weights_have_the_same_bits_too(bits: Bits, llama_checkpoint: Callable[..., Path]) -> None:
    path = llama_checkpoint(**(SHAPE | {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4}))
    fused, plain = rounded(path, bits), one_by_one(rounded(path, bits))
    torch.set_num_threads(2)
    for batch in batches(seed=bits):
        assert torch.equal(fused.logits(batch), plain.logits(batch))


def rounded(path: Path, bits: Bits) -> ModelRunner:
    device, model = open_device("cpu", 1), read_model_spec(json.loads((path / "config.json").read_text()))
    cpu, linear = device.torch_device, LinearFormat(bits=bits, head_bits=8)
    return ModelRunner(
        model=model,
        weights=load_weights(path, whole_model(model), torch.bfloat16, cpu, lambda loaded, total: None, linear),
        cache=allocate_kv_cache(model, num_slots=4096, dtype=torch.bfloat16, device=device),
        device=cpu,
        kernels=kernels_for("cpu"),
    )


def test_more_tokens_than_ever_before_take_larger_buffers(
    llama_checkpoint: Callable[..., Path], make_runner: Callable[..., ModelRunner]
) -> None:
    path = llama_checkpoint(**SHAPE)
    fused, plain = make_runner(path, torch.bfloat16), one_by_one(make_runner(path, torch.bfloat16))
    for count in (3, 200, 1, 300, 3, 200):
        sequence = SequenceInput(token_ids=[7 * i % 500 for i in range(count)], start=0, runs=((0, count),))
        batch = Batch(sequences=(sequence,))
        assert torch.equal(fused.logits(batch), plain.logits(batch))


def test_a_shared_prefix_is_attended_to_once_in_a_program_too(
    llama_checkpoint: Callable[..., Path], make_runner: Callable[..., ModelRunner]
) -> None:
    path = llama_checkpoint(**SHAPE, max_position_embeddings=2048)
    fused, plain = make_runner(path, torch.bfloat16), one_by_one(make_runner(path, torch.bfloat16))
    prefix = SequenceInput(token_ids=[11 * i % 500 for i in range(1100)], start=0, runs=((0, 1100),))
    members = [SequenceInput(token_ids=[3 + i], start=1100, runs=((0, 1100), (2000 + i, 2001 + i))) for i in range(24)]
    shared = SharedSpan(members=tuple(range(24)), first_token=0, num_tokens=1100, runs=((0, 1100),))
    together = Batch(sequences=tuple(members), shared=(shared,))
    (plan,) = fused.lay_out(together).inputs.attention.values()
    assert plan.tasks is not None and plan.tasks.tasks[:, 1].max() == 24
    for batch in (Batch(sequences=(prefix,)), together):
        assert torch.equal(fused.logits(batch), plain.logits(batch))
    assert torch.equal(fused.logits(together), fused.logits(Batch(sequences=tuple(members))))


def test_another_cache_is_another_program(
    llama_checkpoint: Callable[..., Path], make_runner: Callable[..., ModelRunner]
) -> None:
    path = llama_checkpoint(**SHAPE)
    first, second = make_runner(path, torch.bfloat16), make_runner(path, torch.bfloat16)
    batch = Batch(sequences=(SequenceInput(token_ids=[5, 6, 7], start=0, runs=((9, 12),)),))
    expected = first.logits(batch)
    second._weights = first._weights
    assert torch.equal(second.logits(batch), expected)
    for mine, other in zip(first._cache.layers, second._cache.layers, strict=True):
        assert torch.equal(mine.keys[:, 9:12], other.keys[:, 9:12]) and mine.keys[:, 9:12].any()


def test_plans_of_another_variant_run_one_by_one(
    llama_checkpoint: Callable[..., Path], make_runner: Callable[..., ModelRunner]
) -> None:
    path = llama_checkpoint(**SHAPE)
    fused, by_reference = make_runner(path, torch.bfloat16), make_runner(path, torch.bfloat16, kernels=reference)
    by_reference._weights = fused._weights
    batch = Batch(sequences=(SequenceInput(token_ids=[5, 6, 7], start=0, runs=((9, 12),)),))
    torch.testing.assert_close(by_reference.logits(batch), fused.logits(batch), atol=0.1, rtol=0.05)


def test_heads_that_have_no_code_run_one_by_one(
    llama_checkpoint: Callable[..., Path], make_runner: Callable[..., ModelRunner]
) -> None:
    path = llama_checkpoint(**(SHAPE | {"head_dim": 16}))
    assert make_runner(path, torch.bfloat16)._weights.fused is None


def test_float32_runs_one_by_one(
    llama_checkpoint: Callable[..., Path], make_runner: Callable[..., ModelRunner]
) -> None:
    assert make_runner(llama_checkpoint(**SHAPE))._weights.fused is None
