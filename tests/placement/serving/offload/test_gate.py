"""Attention is offloaded where it pays, at the constants of the Lamina paper: H100 for the model, H20 for attention.

Two H100 with four H20 cost about as much as four H100 ($40.64 and $44.24 an hour there), and one with two H20 as much
as two. Rates are those of the devices' data sheets; each node has a link of 400 Gbit/s for each device.
"""

import math
from dataclasses import replace

import pytest

from placement.model.specs import DType, ModelSpec
from placement.planning.residency import Partition
from placement.serving.offload.choice import AttentionWorker, typical_shares
from placement.serving.offload.gate import (
    ModelDevices,
    Offload,
    judge,
    largest_batch,
    least_link_bytes_per_s,
    offloaded_step_s,
    predict_alone,
    predict_offloaded,
)
from placement.serving.offload.verdict import Refusal, Verdict
from placement.serving.offload.work import DecodeWork
from tests.placement.serving.offload.paper_models import LLAMA3_70B, LLAMA_33B, LLAMA_65B

BF16 = DType.BFLOAT16
USABLE = 0.9
LINK = 50e9
SHORT, LONG = 1260, 12_206
"""Prompt and half the answer of the Azure conversation trace and of the Kimi one, as the paper gives their means."""

H20 = AttentionWorker(kv_bytes_per_s=4.0e12, link_bytes_per_s=LINK, kv_cache_bytes=int(USABLE * 96e9))


def h100(count: int, link: float = LINK) -> ModelDevices:
    return ModelDevices(
        memory_bytes=int(USABLE * count * 80e9),
        weight_bytes_per_s=count * 3.35e12,
        flops_per_s=count * 989e12,
        kv_bytes_per_s=count * 3.35e12,
        links_bytes_per_s=(link,) * count,
    )


def offload(
    model: ModelSpec, num_h100: int, workers: tuple[AttentionWorker, ...], *, link: float = LINK, num_replicas: int = 1
) -> Offload:
    workers = tuple(replace(worker, link_bytes_per_s=link) for worker in workers)
    shares, wire_bytes = typical_shares(
        Partition.KV_HEADS, workers, model.layers[0].attention, BF16, LONG, block_size=16
    )
    return Offload(
        model=h100(num_h100, link),
        workers=workers,
        shares=shares,
        wire_bytes=wire_bytes,
        round_trip_s=40e-6,
        num_replicas=num_replicas,
    )


def verdict(model: ModelSpec, context: int, *, link: float = LINK, most_sequences: int | None = None) -> Verdict:
    alone, num_h100, num_h20 = (2, 1, 2) if model is LLAMA_33B else (4, 2, 4)
    return judge(
        DecodeWork.of(model, BF16),
        without=h100(alone),
        offload=offload(model, num_h100, (H20,) * num_h20, link=link),
        context=context,
        most_sequences=most_sequences,
    )


def test_grouped_heads_with_short_contexts_are_refused_by_what_links_carry() -> None:
    found = verdict(LLAMA3_70B, SHORT)
    assert found.refusal is Refusal.LINKS
    assert not found.is_accepted
    assert found.offloaded.num_sequences < found.num_fitting
    assert "not offloaded" in found.reason
    for number in (found.offloaded.num_sequences, found.alone.num_sequences, found.num_fitting, SHORT):
        assert str(number) in found.reason
    assert "fewer tokens/s" in found.reason
    assert "of its 50 GB/s" in found.reason


def test_grouped_heads_with_short_contexts_lose_even_over_links_that_carry_everything() -> None:
    found = verdict(LLAMA3_70B, SHORT, link=1e12)
    assert found.refusal is Refusal.LOSES
    assert found.offloaded.num_sequences == found.num_fitting
    assert -0.15 < found.gain < -0.03
    assert f"{-found.gain:.1%} fewer tokens/s" in found.reason


@pytest.mark.parametrize(
    ("model", "context"),
    [(LLAMA_65B, SHORT), (LLAMA_65B, LONG), (LLAMA_33B, SHORT), (LLAMA_33B, LONG), (LLAMA3_70B, LONG)],
)
def test_the_papers_favourable_cases_are_accepted(model: ModelSpec, context: int) -> None:
    found = verdict(model, context)
    assert found.is_accepted, found.reason
    assert 0.1 < found.gain < 0.901
    assert f"{found.gain:.1%} more tokens/s" in found.reason
    assert found.offloaded.num_sequences > found.alone.num_sequences
    assert max(found.needed_bytes_per_s) <= LINK


@pytest.mark.parametrize("model", [LLAMA3_70B, LLAMA_65B])
def test_links_need_the_papers_bandwidth(model: ModelSpec) -> None:
    work, devices = DecodeWork.of(model, BF16), offload(model, 2, (H20,) * 4)
    batch = 100
    token_bytes = {LLAMA3_70B: 2_949_120, LLAMA_65B: 5_242_880}[model]
    model_s = max(2 * work.flops_per_token / 2 * batch / (2 * 989e12), work.read_bytes / (2 * 3.35e12))
    attention_s = batch * SHORT * 2 * 80 * model.num_kv_heads * 128 * 2 / (4 * 4.0e12)
    needed = token_bytes * batch / (0.2 * (model_s + attention_s))
    found = least_link_bytes_per_s(work, devices, context=SHORT, num_sequences=batch)
    assert found == pytest.approx([needed / 2] * 2 + [needed / 4] * 4)


def test_the_batch_is_what_the_attention_workers_hold() -> None:
    work = DecodeWork.of(LLAMA_65B, BF16)
    assert largest_batch(work, offload(LLAMA_65B, 2, (H20,) * 4), LONG) == int(4 * USABLE * 96e9 // work.kv_bytes(LONG))
    uneven = (H20, replace(H20, kv_cache_bytes=H20.kv_cache_bytes // 2))
    devices = offload(LLAMA_65B, 2, uneven)
    assert largest_batch(work, devices, SHORT) == uneven[1].kv_cache_bytes // (work.kv_bytes(SHORT) // 2)


def test_few_sequences_gain_nothing() -> None:
    found = verdict(LLAMA_65B, LONG, most_sequences=2)
    assert found.refusal is Refusal.LOSES
    assert found.alone.num_sequences == found.offloaded.num_sequences == 2


def test_weights_that_do_not_fit_are_refused_with_the_bytes() -> None:
    work = DecodeWork.of(LLAMA3_70B, BF16)
    found = judge(work, without=h100(4), offload=offload(LLAMA3_70B, 1, (H20,) * 4), context=LONG)
    assert found.refusal is Refusal.WEIGHTS
    assert "131 GiB of the 67.1 GiB" in found.reason


def test_attention_workers_without_room_for_one_sequence_are_refused_with_the_bytes() -> None:
    small = replace(H20, kv_cache_bytes=2**20)
    found = judge(
        DecodeWork.of(LLAMA3_70B, BF16), without=h100(4), offload=offload(LLAMA3_70B, 2, (small,)), context=SHORT
    )
    assert found.refusal is Refusal.NO_ROOM
    assert "394 MiB of the 1 MiB" in found.reason


def test_links_that_carry_no_sequence_are_refused_with_what_one_needs() -> None:
    found = verdict(LLAMA_65B, SHORT, link=1e6)
    assert found.refusal is Refusal.LINKS
    assert not found.offloaded.num_sequences
    assert "of its 0.001 GB/s, with one sequence" in found.reason


def test_a_model_that_fits_nowhere_else_with_its_keys_and_values_is_offloaded() -> None:
    found = judge(
        DecodeWork.of(LLAMA3_70B, BF16), without=h100(2), offload=offload(LLAMA3_70B, 2, (H20,) * 4), context=100_000
    )
    assert found.is_accepted
    assert found.gain == math.inf
    assert "not one sequence of 100000 tokens fits" in found.reason


def test_one_replica_takes_two_micro_batches_where_they_hide_attention_and_one_where_weights_are_most() -> None:
    work, devices = DecodeWork.of(LLAMA3_70B, BF16), offload(LLAMA3_70B, 2, (H20,) * 4, link=1e12)
    assert predict_offloaded(work, devices, context=SHORT, batch=800).num_micro_batches == 2
    assert predict_offloaded(work, devices, context=SHORT, batch=2).num_micro_batches == 1


def test_more_replicas_share_the_attention_workers_until_these_are_busy() -> None:
    work = DecodeWork.of(LLAMA_65B, BF16)
    rates = []
    for count in (1, 2, 3, 4):
        devices = offload(LLAMA_65B, 2, (H20,) * 4, link=1e12, num_replicas=count)
        found = predict_offloaded(work, devices, context=SHORT, batch=largest_batch(work, devices, SHORT))
        assert found.num_micro_batches == (count + 1 if count > 1 else found.num_micro_batches)
        rates.append(found.tokens_per_s)
    assert rates == sorted(rates)
    busiest = 4 * H20.kv_bytes_per_s / work.attended_bytes(SHORT)
    assert rates[-1] <= busiest * (1 + 1e-9)


def test_a_step_takes_no_less_than_its_links_need() -> None:
    work, devices = DecodeWork.of(LLAMA_65B, BF16), offload(LLAMA_65B, 2, (H20,) * 4, link=1e9)
    step_s = offloaded_step_s(work, devices, SHORT, 100, 2)
    assert step_s >= 100 * 5_242_880 / 2 / 1e9 * (1 - 1e-9)


def test_windows_bound_what_attention_reads_but_not_what_is_kept() -> None:
    windowed = replace(LLAMA3_70B, windows=(1024, None) * 40)
    work, whole = DecodeWork.of(windowed, BF16), DecodeWork.of(LLAMA3_70B, BF16)
    assert work.kv_bytes(LONG) == whole.kv_bytes(LONG) == LONG * 327_680
    assert work.attended_bytes(LONG) == (LONG + 1024) * 327_680 // 2


def test_devices_alone_hold_weights_and_keys_and_values() -> None:
    work = DecodeWork.of(LLAMA3_70B, BF16)
    found = predict_alone(work, h100(4), context=LONG)
    assert found.num_sequences == (h100(4).memory_bytes - work.weight_bytes) // (LONG * 327_680)
    read = work.read_bytes + found.num_sequences * LONG * 327_680
    assert found.step_s == pytest.approx(read / (4 * 3.35e12))


def test_tied_embeddings_are_read_as_the_head() -> None:
    tied = DecodeWork.of(replace(LLAMA3_70B, tied_embeddings=True), BF16)
    untied = DecodeWork.of(LLAMA3_70B, BF16)
    assert tied.weight_bytes == tied.read_bytes == untied.read_bytes


def test_measured_steps_take_the_place_of_the_roofline() -> None:
    work = DecodeWork.of(LLAMA_33B, BF16)
    measured = replace(h100(4), steps=((1, 0.01), (9, 0.02), (17, 0.04)))
    steps_s = [
        predict_alone(work, measured, context=1, most_sequences=count).step_s
        - count * work.attended_bytes(1) / measured.kv_bytes_per_s
        for count in (1, 5, 9, 13, 17, 25)
    ]
    assert steps_s == pytest.approx([0.01, 0.015, 0.02, 0.03, 0.04, 0.06])
