"""Replicas whose keys and values attention workers hold answer as transformers does, however these divide them."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from placement.planning.residency import Partition
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from tests.support.deploying.answers import LONG, NUM_TOKENS, SHORT, check_equal, expected, prompt
from tests.support.deploying.offloaded import SIZES, boxes, group_checkpoint, offloaded
from tests.support.deploying.replicas import Replica, Stream, replica, settled, tokens
from tests.support.oracle import CHECKPOINTS, WIDE


async def ask_all(of: Replica, texts: list[list[int]], **fields: Any) -> list[list[pb.SequenceOutput]]:
    """The answers to several prompts that run together."""
    stream = Stream(of)
    ids = [(await stream.submit(prompt_ids=text, max_tokens=NUM_TOKENS, logprobs=0, **fields))[0] for text in texts]
    answers = await stream.answers(ids)
    stream.close()
    return [answers[sequence_id] for sequence_id in ids]


@pytest.mark.parametrize("partition", Partition)
@pytest.mark.parametrize("group", [1, 4, 8])
async def test_answers_are_those_of_transformers(
    checkpoint: Callable[..., Path], partition: Partition, group: int
) -> None:
    """One, two and three attention workers, of unequal weights, with all blocks or with two thirds of them."""
    path = group_checkpoint(checkpoint, group)
    long, short = prompt(LONG), prompt(SHORT, 90)
    texts = [long, short, [*long[:100], *prompt(50, 200)]]
    wanted = [expected(path, text) for text in texts]
    async with boxes(3) as workers:
        for count, weights in ((1, [1.0]), (2, [3.0, 1.0]), (3, [1.0, 2.0, 1.0])):
            for num_local, q_first in ((0, True), (32, False)):
                async with offloaded(
                    path, workers[:count], partition, weights=weights, num_local_blocks=num_local, q_first=q_first,
                    epoch=100 + 10 * count + bool(num_local), replica=f"{count} {num_local}", **SIZES,
                ) as found:  # fmt: skip
                    for _ in range(2):  # again, from the prefix cache
                        for outputs, answer in zip(await ask_all(found, texts), wanted, strict=True):
                            check_equal(outputs, answer)
                    await settled(found)


@pytest.mark.parametrize("name", CHECKPOINTS)
async def test_every_family_answers_as_transformers_does(checkpoint: Callable[..., Path], name: str) -> None:
    family, config = CHECKPOINTS[name]
    path, texts = checkpoint(family, **config), [prompt(120), prompt(40, 60), prompt(9, 5)]
    wanted = [expected(path, text) for text in texts]
    async with boxes(2) as workers:
        for partition in Partition:
            async with offloaded(
                path, workers, partition, num_local_blocks=8, replica=partition.value, **SIZES
            ) as found:
                for outputs, answer in zip(await ask_all(found, texts), wanted, strict=True):
                    check_equal(outputs, answer)


@pytest.mark.parametrize("kind", ["tp2", "pp2"])
@pytest.mark.parametrize("partition", Partition)
async def test_ranks_have_sessions_of_their_own(
    checkpoint: Callable[..., Path], partition: Partition, kind: str
) -> None:
    path, texts = group_checkpoint(checkpoint, 2), [prompt(LONG), prompt(SHORT, 90), prompt(50, 30)]
    wanted = [expected(path, text) for text in texts]
    async with boxes(3) as workers:
        for num_local in (0, 20):
            async with offloaded(
                path, workers, partition, kind=kind, weights=[2, 1, 1], num_local_blocks=num_local,
                replica=str(num_local), **SIZES,
            ) as found:  # fmt: skip
                for outputs, answer in zip(await ask_all(found, texts), wanted, strict=True):
                    check_equal(outputs, answer)


async def test_choices_fork_and_draw_as_where_nothing_is_offloaded(checkpoint: Callable[..., Path]) -> None:
    path = group_checkpoint(checkpoint, 2)
    sampling = pb.Sampling(temperature=0.9, top_p=0.95, top_k=40, repetition_penalty=1.2)
    answers: list[list[list[int]]] = []
    async with boxes(2) as workers:
        async with replica("plain", path, "tp1", epoch=3, **SIZES) as plain:
            answers.append(await _forks(plain, sampling))
        async with offloaded(path, workers, Partition.KV_HEADS, **SIZES) as found:
            answers.append(await _forks(found, sampling))
            await settled(found)
    assert answers[0] == answers[1] and len({tuple(answer) for answer in answers[0]}) > 1


async def _forks(of: Replica, sampling: pb.Sampling) -> list[list[int]]:
    stream = Stream(of)
    ids = await stream.submit(num_forks=3, prompt_ids=prompt(70), max_tokens=NUM_TOKENS, sampling=sampling)
    answers = await stream.answers(ids)
    stream.close()
    return [tokens(answers[sequence_id]) for sequence_id in ids]


async def test_preempted_sequences_begin_anew(checkpoint: Callable[..., Path]) -> None:
    """Six sequences that need 20 blocks each, of 48 that there are."""
    path, texts = group_checkpoint(checkpoint, 2), [prompt(140, first) for first in range(5, 11)]
    wanted = [expected(path, text) for text in texts]
    sizes = SIZES | {"num_blocks": 48, "max_num_seqs": 6, "prefix_cache": False}
    async with boxes(2) as workers, offloaded(path, workers, Partition.REQUESTS, **sizes) as found:
        for outputs, answer in zip(await ask_all(found, texts), wanted, strict=True):
            check_equal(outputs, answer)
        await settled(found)


@pytest.mark.parametrize("staggered", [True, False])
async def test_compiled_layers_answer_in_bfloat16(checkpoint: Callable[..., Path], staggered: bool) -> None:
    """The layers are one program, which stops for attention. Sums differ in their last bits, so few tokens may."""
    path = checkpoint("llama", dtype="bfloat16", num_hidden_layers=3, **WIDE)
    texts = [prompt(60), prompt(33, 20), prompt(80, 7), prompt(12, 90)]
    sizes = SIZES | {"dtype": pb.DTYPE_BFLOAT16, "token_budget": 64}
    async with boxes(1) as workers:
        async with replica("plain", path, "tp1", epoch=3, **sizes) as plain:
            wanted = [tokens(outputs) for outputs in await ask_all(plain, texts)]
        async with offloaded(path, workers, Partition.KV_HEADS, staggered=staggered, **sizes) as found:
            answers = [tokens(outputs) for outputs in await ask_all(found, texts)]
    assert sum(a[:4] == b[:4] for a, b in zip(wanted, answers, strict=True)) >= 3
    await asyncio.sleep(0)


@pytest.mark.parametrize("kind", ["tp2", "pp2"])
async def test_ranks_whose_layers_are_compiled_stop_for_attention_too(
    checkpoint: Callable[..., Path], kind: str
) -> None:
    path = checkpoint("llama", dtype="bfloat16", num_hidden_layers=4, **WIDE)
    texts = [prompt(60), prompt(33, 20), prompt(80, 7), prompt(12, 90)]
    sizes = SIZES | {"dtype": pb.DTYPE_BFLOAT16, "token_budget": 64}
    async with boxes(2) as workers:
        async with replica("plain", path, kind, epoch=3, **sizes) as plain:
            wanted = [tokens(outputs) for outputs in await ask_all(plain, texts)]
        async with offloaded(path, workers, Partition.KV_HEADS, kind=kind, **sizes) as found:
            answers = [tokens(outputs) for outputs in await ask_all(found, texts)]
    assert sum(a[:4] == b[:4] for a, b in zip(wanted, answers, strict=True)) >= 3


@pytest.mark.parametrize("num_local", [0, 20])
async def test_a_rank_without_kv_heads_has_no_session(checkpoint: Callable[..., Path], num_local: int) -> None:
    """One KV head is all that there is, and the first of two ranks has it."""
    path, texts = group_checkpoint(checkpoint, 8), [prompt(LONG), prompt(SHORT, 90)]
    wanted = [expected(path, text) for text in texts]
    async with (
        boxes(2) as workers,
        offloaded(path, workers, Partition.TOKEN_RANGES, kind="tp2", num_local_blocks=num_local, **SIZES) as found,
    ):
        for outputs, answer in zip(await ask_all(found, texts), wanted, strict=True):
            check_equal(outputs, answer)
