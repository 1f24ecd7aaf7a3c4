"""Prompts computed by one replica and answered by another, whatever the cut of both, over real connections."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from protos.heterodyne.worker.v1 import worker_pb2 as pb
from tests.support.deploying.answers import LONG, NUM_TOKENS, SHORT, check_equal, expected, prompt
from tests.support.deploying.replicas import LAYOUTS, Replica, Stream, replica, settled, tokens, transfer
from tests.support.oracle import CHECKPOINTS, WIDE

SIZES: dict[str, Any] = {"num_blocks": 96, "token_budget": 48, "max_context_tokens": 256, "prefix_cache": True}


@pytest.fixture(scope="module")
def path(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint("llama", num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4, hidden_size=64)


@pytest.mark.parametrize("target", LAYOUTS)
async def test_answers_are_those_of_one_replica_whatever_the_cut_of_both_sides(path: Path, target: str) -> None:
    """Blocks have other sizes on the two sides. The second long prompt begins as the first and differs at its end."""
    long, short = prompt(LONG), prompt(SHORT, 90)
    again = [*long[:100], *prompt(50, 200)]
    wanted = {tuple(text): expected(path, text) for text in (long, short, again)}
    async with AsyncExitStack() as stack:
        decode = await stack.enter_async_context(replica("decode", path, target, epoch=7, **SIZES | {"block_size": 4}))
        stream = Stream(decode)
        for kind in LAYOUTS:
            source = await stack.enter_async_context(
                replica(kind, path, kind, epoch=40, **SIZES | {"prefix_cache": kind != "tp1"})
            )
            salt = kind.encode()  # what one source has sent is nothing that the next need not send
            for text in (long, short, again):
                outputs = await stream.answer(
                    source=source, prompt_ids=text, max_tokens=NUM_TOKENS, logprobs=0, cache_salt=salt
                )
                check_equal(outputs, wanted[tuple(text)])
                moved = transfer(outputs)
                assert moved is not None and not moved.problem, (kind, target, moved)
                reused = 100 if text is again else 0
                assert moved.num_tokens == len(text) - 1 - reused, "what the target has is not sent"
                assert moved.num_bytes == moved.num_tokens * 3 * 2 * 4 * 8 * 4, "every number once"
                assert moved.by_layer == (moved.num_tokens >= 64)
            await settled(source, decode)
        stream.close()


@pytest.mark.parametrize("name", CHECKPOINTS)
async def test_every_family_answers_as_transformers_does(checkpoint: Callable[..., Path], name: str) -> None:
    family, config = CHECKPOINTS[name]
    path, text = checkpoint(family, **config), prompt(120)
    wanted = expected(path, text)
    async with (
        replica("prefill", path, "pp2", epoch=3, **SIZES) as source,
        replica("decode", path, "sp2", epoch=4, **SIZES | {"block_size": 4}) as decode,
    ):
        for salt, first, second in ((b"there", source, decode), (b"back", decode, source)):
            stream = Stream(second)
            outputs = await stream.answer(
                source=first, prompt_ids=text, max_tokens=NUM_TOKENS, logprobs=0, cache_salt=salt
            )
            moved = transfer(outputs)
            assert moved is not None and not moved.problem, moved
            check_equal(outputs, wanted)
            stream.close()
        await settled(source, decode)


@pytest.fixture
async def pair(path: Path) -> AsyncIterator[tuple[Replica, Replica]]:
    async with (
        replica("prefill", path, "tp2", epoch=3, **SIZES) as source,
        replica("decode", path, "tp1", epoch=4, **SIZES) as decode,
    ):
        yield source, decode


async def test_the_choices_of_a_request_share_one_transfer(path: Path, pair: tuple[Replica, Replica]) -> None:
    source, decode = pair
    text = prompt(LONG)
    stream = Stream(decode)
    ids = await stream.submit(num_forks=3, source=source, prompt_ids=text, max_tokens=NUM_TOKENS, logprobs=0)
    answers = await stream.answers(ids)
    for outputs in answers.values():
        check_equal(outputs, expected(path, text))
    assert (await decode.load_report()).kv_transfers == 1
    await settled(source, decode)
    stream.close()


async def test_sampling_is_that_of_one_replica(pair: tuple[Replica, Replica]) -> None:
    """Draws and penalties go by what the answering replica knows, so nothing of them has to move."""
    source, decode = pair
    sampling = pb.Sampling(temperature=0.9, top_p=0.95, top_k=40, repetition_penalty=1.2, presence_penalty=0.1)
    fields: dict[str, Any] = {"prompt_ids": prompt(70), "max_tokens": NUM_TOKENS, "sampling": sampling}
    answers = []
    for elsewhere in (None, source):  # a sequence draws by its seed, which is its number in its stream
        stream = Stream(decode)
        answers.append(await stream.answer(source=elsewhere, cache_salt=bytes([elsewhere is None]), **fields))
        stream.close()
    assert tokens(answers[0]) == tokens(answers[1]) and len(set(tokens(answers[0]))) > 1
    assert transfer(answers[0]) is None and transfer(answers[1]) is not None
    await settled(source, decode)


async def test_structured_output_is_that_of_one_replica(served_checkpoint: Path) -> None:
    fields: dict[str, Any] = {
        "prompt_ids": prompt(70),
        "max_tokens": 40,
        "grammar": pb.Grammar(regex="(yes|no), (yes|no)!"),
        "stop_token_ids": [2],
    }
    async with (
        replica("prefill", served_checkpoint, "pp2", epoch=3, **SIZES) as source,
        replica("decode", served_checkpoint, "tp1", epoch=4, **SIZES) as decode,
    ):
        stream = Stream(decode)
        alone = await stream.answer(**fields)
        split = await stream.answer(source=source, cache_salt=b"other", **fields)
        assert tokens(split) == tokens(alone) and split[-1].end.reason == pb.END_REASON_STOP
        moved = transfer(split)
        assert moved is not None and not moved.problem
        await settled(source, decode)
        stream.close()


async def test_a_prompt_that_is_scored_is_computed_where_it_is_answered(pair: tuple[Replica, Replica]) -> None:
    source, decode = pair
    stream = Stream(decode)
    fields: dict[str, Any] = {"prompt_ids": prompt(70), "max_tokens": 2, "prompt_logprobs": 1}
    alone = await stream.answer(**fields)
    split = await stream.answer(source=source, **fields)
    scores = [[score for output in each for score in output.prompt.logprobs] for each in (alone, split)]
    assert len(scores[0]) == 69 and scores[1] == pytest.approx(scores[0], abs=1e-4)
    assert tokens(split) == tokens(alone) and transfer(split) is None
    await settled(source, decode)
    stream.close()


async def test_number_types_and_formats_may_differ(path: Path) -> None:
    """In 8 bits and in bfloat16 answers may differ; they are whole, and as many bytes as that takes were sent."""
    text = prompt(100)
    async with (
        replica("prefill", path, "tp2", epoch=3, **SIZES | {"dtype": pb.DTYPE_BFLOAT16}) as source,
        replica("decode", path, "pp2", epoch=4, **SIZES) as decode,
        replica("rounded", path, "tp1", epoch=5, kv_format=pb.KV_FORMAT_INT8, **SIZES) as rounded,
    ):
        sent = []
        for target in (decode, rounded):
            stream = Stream(target)
            outputs = await stream.answer(source=source, prompt_ids=text, max_tokens=NUM_TOKENS)
            moved = transfer(outputs)
            assert moved is not None and not moved.problem, moved
            assert len(tokens(outputs)) == NUM_TOKENS
            sent.append(moved.num_bytes)
            stream.close()
        assert sent[0] == 99 * 3 * 2 * 4 * 8 * 2
        assert 0.5 * sent[0] < sent[1] < 0.8 * sent[0], "a scale for each head and block of 8 tokens comes with them"
        await settled(source, decode, rounded)


@pytest.mark.parametrize("kind", ["tp1", "tp2", "pp2"])
async def test_compiled_layers_tell_of_each_layer_and_compute_the_same_bits(
    checkpoint: Callable[..., Path], kind: str
) -> None:
    """In bfloat16 two replicas of one cut answer, to the last bit, as one of them does alone."""
    path, text = checkpoint("llama", dtype="bfloat16", num_hidden_layers=3, **WIDE), prompt(140)
    sizes = SIZES | {"dtype": pb.DTYPE_BFLOAT16, "token_budget": 64}
    async with (
        replica("prefill", path, kind, epoch=3, **sizes) as source,
        replica("decode", path, kind, epoch=4, **sizes) as decode,
    ):
        stream = Stream(decode)
        fields: dict[str, Any] = {"prompt_ids": text, "max_tokens": 30, "logprobs": 0}
        alone = await stream.answer(**fields)
        split = await stream.answer(source=source, cache_salt=b"other", **fields)
        moved = transfer(split)
        assert moved is not None and moved.by_layer and not moved.problem
        assert [(it.token_id, it.logprob) for it in split] == [(it.token_id, it.logprob) for it in alone]
        await settled(source, decode)
        stream.close()


async def test_a_source_that_is_not_there_any_more_is_done_without(path: Path, pair: tuple[Replica, Replica]) -> None:
    source, decode = pair
    text = prompt(LONG)
    fenced = pb.PrefillSource(replica="prefill", epoch=source.epoch - 1, address=source.address)
    nobody = pb.PrefillSource(replica="nobody", epoch=1, address="127.0.0.1:1")
    stream = Stream(decode)
    for number, gone in enumerate((fenced, nobody)):
        outputs = await stream.answer(
            prefill=gone, prompt_ids=text, max_tokens=NUM_TOKENS, logprobs=0, cache_salt=bytes([number])
        )
        check_equal(outputs, expected(path, text))
        moved = transfer(outputs)
        assert moved is not None and moved.problem and not moved.num_tokens
    assert (await decode.load_report()).kv_failures == 2
    await settled(source, decode)
    stream.close()


@pytest.mark.parametrize("after_s", [0.0, 0.05, 0.3])
async def test_cancelling_in_any_phase_leaves_no_block_behind(pair: tuple[Replica, Replica], after_s: float) -> None:
    source, decode = pair
    stream = Stream(decode)
    ids = []
    for number in range(4):
        salt = bytes([number])
        ids += await stream.submit(source=source, prompt_ids=prompt(LONG), max_tokens=100, cache_salt=salt)
    await asyncio.sleep(after_s)
    for sequence_id in ids:
        await stream.cancel(sequence_id)
    answers = await stream.answers(ids)
    assert {outputs[-1].end.reason for outputs in answers.values()} == {pb.END_REASON_CANCELLED}
    await settled(source, decode)
    stream.close()


async def test_preempted_sequences_answer_the_same_on_either_side(path: Path) -> None:
    """Neither side has blocks for all at once: what is preempted is computed again, where it is answered."""
    texts = [prompt(60, first) for first in (5, 50, 100, 150, 200, 250)]
    tight = SIZES | {"num_blocks": 28, "prefix_cache": False}
    async with (
        replica("prefill", path, "tp1", epoch=3, **tight) as source,
        replica("decode", path, "tp2", epoch=4, **tight) as decode,
    ):
        stream = Stream(decode)
        ids = [(await stream.submit(source=source, prompt_ids=text, max_tokens=30, logprobs=0))[0] for text in texts]
        answers = await stream.answers(ids)
        for sequence_id, text in zip(ids, texts, strict=True):
            check_equal(answers[sequence_id], expected(path, text, 30))
        assert (await decode.load_report()).num_preemptions > 0
        await settled(source, decode)
        stream.close()


async def test_a_prompt_that_is_preempted_at_its_source_is_computed_where_it_is_answered(path: Path) -> None:
    """Answers of higher priority grow at the source, until the blocks of the prompt that is under way are taken."""
    text, own = prompt(100), [prompt(40, first) for first in (30, 60)]
    async with (
        replica(
            "prefill", path, "tp2", epoch=3, **SIZES | {"num_blocks": 28, "token_budget": 4, "max_num_seqs": 4}
        ) as source,
        replica("decode", path, "pp2", epoch=4, **SIZES) as decode,
    ):
        busy, stream = Stream(source), Stream(decode)
        ids = [(await busy.submit(prompt_ids=each, max_tokens=70, priority=5, logprobs=0))[0] for each in own]
        async with asyncio.timeout(60.0):
            while (await source.load_report()).output_tokens < 8:
                await asyncio.sleep(0.01)
        outputs = await stream.answer(source=source, prompt_ids=text, max_tokens=NUM_TOKENS, logprobs=0)
        check_equal(outputs, expected(path, text))
        moved = transfer(outputs)
        assert moved is not None and moved.problem, "it ended in the middle"
        assert (await source.load_report()).num_preemptions > 0
        answers = await busy.answers(ids)
        for sequence_id, each in zip(ids, own, strict=True):
            check_equal(answers[sequence_id], expected(path, each, 70))
        await settled(source, decode)
        busy.close()
        stream.close()
