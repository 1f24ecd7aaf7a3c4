"""Prompts that another replica computes for one whose keys and values attention workers hold."""

from collections.abc import Callable
from pathlib import Path

import pytest

from placement.planning.residency import Partition
from tests.support.deploying.answers import LONG, NUM_TOKENS, SHORT, check_equal, expected, prompt
from tests.support.deploying.offloaded import SIZES, boxes, group_checkpoint, offloaded
from tests.support.deploying.replicas import LAYOUTS, Stream, replica, settled, transfer


@pytest.mark.parametrize("partition", Partition)
@pytest.mark.parametrize("kind", ["tp1", "tp2"])
async def test_keys_and_values_go_on_to_the_attention_workers(
    checkpoint: Callable[..., Path], partition: Partition, kind: str
) -> None:
    path = group_checkpoint(checkpoint, 2)
    long, short = prompt(LONG), prompt(SHORT, 90)
    again = [*long[:100], *prompt(50, 200)]
    wanted = {tuple(text): expected(path, text) for text in (long, short, again)}
    async with boxes(2) as workers:
        for source_kind, num_local in zip(LAYOUTS, (0, 24, 0, 24), strict=True):
            async with (
                replica("prefill", path, source_kind, epoch=3, **SIZES) as source,
                offloaded(
                    path, workers, partition, kind=kind, weights=[2, 1], num_local_blocks=num_local,
                    replica=source_kind, **SIZES,
                ) as decode,
            ):  # fmt: skip
                stream = Stream(decode)
                for text in (long, short, again):
                    outputs = await stream.answer(source=source, prompt_ids=text, max_tokens=NUM_TOKENS, logprobs=0)
                    check_equal(outputs, wanted[tuple(text)])
                    moved = transfer(outputs)
                    assert moved is not None and not moved.problem, (source_kind, moved)
                stream.close()
                await settled(source, decode)


async def test_an_offloaded_replica_computes_no_prompts_for_others(checkpoint: Callable[..., Path]) -> None:
    """Whoever asked computes the prompt itself."""
    path, text = group_checkpoint(checkpoint, 2), prompt(60)
    wanted = expected(path, text)
    async with (
        boxes(1) as workers,
        offloaded(path, workers, Partition.KV_HEADS, **SIZES) as source,
        replica("decode", path, "tp1", epoch=3, **SIZES) as decode,
    ):
        stream = Stream(decode)
        outputs = await stream.answer(source=source, prompt_ids=text, max_tokens=NUM_TOKENS, logprobs=0)
        check_equal(outputs, wanted)
        moved = transfer(outputs)
        assert moved is not None and "attention workers" in moved.problem
        stream.close()
