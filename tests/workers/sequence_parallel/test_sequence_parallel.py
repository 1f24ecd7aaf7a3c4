"""Sequences shared by ranks, against transformers: same logits, same greedy tokens, for every family and exchange."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from placement.measured.exchange import Exchange
from placement.measured.overlap import OverlapTable
from placement.planning.layout import Split
from tests.support.oracle import CHECKPOINTS, WIDE, continue_greedily, greedy_each, oracle_logits
from tests.support.ranks import BLOCK_SIZE, Ranks, ranks
from workers.step.runner import ModelRunner
from workers.step.types import Batch, SequenceInput
from workers.transport.errors import PeerFailed

SHARES: dict[str, tuple[int, ...]] = {"even": (1, 1), "3:1": (3, 1), "5:2:1": (5, 2, 1), "zero": (0, 2, 1)}
NUM_OUTPUTS = 16
TOKEN_IDS = [i * 31 % 509 for i in range(120)]
RUNS = ((8, 128),)
PROMPTS = {length: [random.Random(length).randrange(509) for _ in range(length)] for length in (1, 17, 70, 5)}


@pytest.fixture(scope="module", params=CHECKPOINTS)
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(scope="module")
def path(name: str, checkpoint: Callable[..., Path]) -> Path:
    family, config = CHECKPOINTS[name]
    return checkpoint(family, **config)


@pytest.fixture(scope="module")
def oracle(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def answers(oracle: PreTrainedModel) -> list[list[int]]:
    return greedy_each(oracle, [*PROMPTS.values()], NUM_OUTPUTS)


@pytest.fixture(scope="module", params=SHARES)
def cut(request: pytest.FixtureRequest, name: str, path: Path) -> Iterator[Ranks]:
    """Every checkpoint meets all shares and all exchanges, and all shares meet all exchanges.

    Not each combination of the three: an exchange moves rows of heads, whatever the model is.
    """
    number = list(CHECKPOINTS).index(name) + list(SHARES).index(request.param)
    with ranks(path, SHARES[request.param], split="sequence", way=list(Exchange)[number % len(Exchange)]) as made:
        yield made


def test_log_probabilities_of_every_position_match(cut: Ranks, oracle: PreTrainedModel) -> None:
    expected = oracle_logits(oracle, TOKEN_IDS).log_softmax(dim=-1)
    torch.testing.assert_close(cut.log_probs(TOKEN_IDS, RUNS), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chunk_size", [20, 128])
def test_greedy_tokens_match(cut: Ranks, answers: list[list[int]], chunk_size: int) -> None:
    found = continue_greedily(cut, list(PROMPTS.values()), chunk_size, NUM_OUTPUTS, block_size=BLOCK_SIZE)
    assert found == answers


@pytest.mark.parametrize("shares", SHARES)
def test_all_exchanges_give_the_same_bits_in_layers_that_run_as_one_program(
    llama_checkpoint: Callable[..., Path], make_runner: Callable[..., ModelRunner], shares: str
) -> None:
    path = llama_checkpoint(**WIDE)
    if make_runner(path, torch.bfloat16)._weights.fused is None:
        pytest.skip("no code for this CPU")
    found: list[Tensor] = []
    answers: list[list[list[int]]] = []
    for way in Exchange:
        with ranks(path, SHARES[shares], split="sequence", way=way, dtype=torch.bfloat16) as cut:
            assert all(cut.runner(rank)._weights.fused is not None for rank in range(cut.num_ranks))
            found.append(cut.log_probs(TOKEN_IDS, RUNS))
            # Chunks beside decodes, in the middle of their prompts.
            answers.append(continue_greedily(cut, list(PROMPTS.values()), 24, NUM_OUTPUTS, block_size=BLOCK_SIZE))
    assert all(torch.equal(one, found[0]) for one in found)
    assert all(one == answers[0] for one in answers)
    with ranks(path, (1,)) as exact, ranks(path, (1,), dtype=torch.bfloat16) as rounded:
        expected, whole = exact.log_probs(TOKEN_IDS, RUNS), rounded.log_probs(TOKEN_IDS, RUNS)
    assert (found[0] - expected).norm() < 1.5 * (whole - expected).norm()


@pytest.mark.parametrize(("split", "way"), [("tensor", None), *(("sequence", way) for way in Exchange)], ids=str)
def test_a_rank_that_is_lost_in_the_midst_of_a_step_ends_it(
    llama_checkpoint: Callable[..., Path], split: Split, way: Exchange | None
) -> None:
    """Of a model whose steps take a while; and where every layer is shared, of overlapped steps."""
    prompt = SequenceInput(token_ids=[7] * 960, start=0, runs=((0, 960),))
    path = llama_checkpoint(num_hidden_layers=24, max_position_embeddings=1024)
    with ranks(path, (1, 1), split=split, way=way, checks=False) as cut:
        if split == "tensor":
            for rank in range(2):
                cut.runner(rank).overlap = OverlapTable(num_tokens=(1,), alone_s=(2.0,), overlapped_s=(1.0,))
        cut.prepare(Batch(sequences=(prompt,)))()
        losing = threading.Timer(0.1, cut.membership(1).leave, ["it is lost"])
        losing.start()
        with pytest.raises(PeerFailed, match="it is lost"):
            while True:
                began_s = time.monotonic()
                cut.prepare(Batch(sequences=(prompt,)))()
        assert time.monotonic() - began_s < 3.0
        losing.join()
