"""What ranks that share sequences tell of their choice of an exchange."""

from collections.abc import Callable
from pathlib import Path

import pytest

from placement.measured.exchange import TYPICAL_BEFORE, TYPICAL_TOKENS, Exchange
from placement.measured.measurements import NOTHING_MEASURED
from tests.support.ranks import ranks


@pytest.mark.parametrize(("context", "befores"), [(512, (0,)), (4096, (0, 2048)), (16384, TYPICAL_BEFORE)])
def test_the_first_rank_tells_what_is_chosen_for_chunks_that_the_context_holds(
    llama_checkpoint: Callable[..., Path], context: int, befores: tuple[int, ...]
) -> None:
    with ranks(llama_checkpoint(max_position_embeddings=context), (3, 1), split="sequence") as cut:
        measured = cut.membership(0).measured
        assert cut.membership(1).measured == NOTHING_MEASURED
    assert measured.exchange is not None and not measured.sums and not measured.overlap
    assert len(measured.exchange.speeds.pairs_per_s) == 2
    chunks = measured.exchange.expected
    assert [(chunk.num_tokens, chunk.num_before) for chunk in chunks] == [(TYPICAL_TOKENS, at) for at in befores]
    assert all(chunk.way in {way.value for way in Exchange} and chunk.layer_s > 0 for chunk in chunks)


def test_the_exchange_told_is_the_one_that_is_forced(llama_checkpoint: Callable[..., Path]) -> None:
    with ranks(llama_checkpoint(), (1, 1), split="sequence", way=Exchange.RING) as cut:
        measured = cut.membership(0).measured.exchange
    assert measured is not None and [chunk.way for chunk in measured.expected] == ["ring"]
