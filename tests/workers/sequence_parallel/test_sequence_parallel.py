"""Sequences shared by ranks, against transformers: same logits, same greedy tokens, for every family and exchange."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from placement.exchange import Exchange
from tests.support.oracle import CHECKPOINTS, continue_greedily, greedy, oracle_logits
from tests.support.ranks import BLOCK_SIZE, Ranks, ranks
from workers.runner import ModelRunner

SHARES: dict[str, tuple[int, ...]] = {"even": (1, 1), "3:1": (3, 1), "5:2:1": (5, 2, 1), "zero": (0, 2, 1)}
NUM_OUTPUTS = 16
TOKEN_IDS = [i * 31 % 509 for i in range(120)]
RUNS = ((8, 128),)
PROMPTS = {length: [random.Random(length).randrange(509) for _ in range(length)] for length in (1, 17, 70, 5)}


@pytest.fixture(scope="module", params=CHECKPOINTS)
def path(request: pytest.FixtureRequest, checkpoint: Callable[..., Path]) -> Path:
    family, config = CHECKPOINTS[request.param]
    return checkpoint(family, **config)


@pytest.fixture(scope="module")
def oracle(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def answers(oracle: PreTrainedModel) -> list[list[int]]:
    return [greedy(oracle, prompt, NUM_OUTPUTS) for prompt in PROMPTS.values()]


CASES = [
    ("even", Exchange.TOKEN_RING),
    *(("3:1", way) for way in Exchange),
    *(("5:2:1", way) for way in Exchange),
    ("zero", Exchange.RING),
]


@pytest.fixture(scope="module", params=CASES, ids=str)
def cut(request: pytest.FixtureRequest, path: Path) -> Iterator[Ranks]:
    shares, way = request.param
    with ranks(path, SHARES[shares], split="sequence", way=way) as made:
        yield made


def test_log_probabilities_of_every_position_match(cut: Ranks, oracle: PreTrainedModel) -> None:
    expected = oracle_logits(oracle, TOKEN_IDS).log_softmax(dim=-1)
    torch.testing.assert_close(cut.log_probs(TOKEN_IDS, RUNS), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chunk_size", [7, 128])
def test_greedy_tokens_match(cut: Ranks, answers: list[list[int]], chunk_size: int) -> None:
    found = continue_greedily(cut, list(PROMPTS.values()), chunk_size, NUM_OUTPUTS, block_size=BLOCK_SIZE)
    assert found == answers


WIDE = {
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 512,
    "head_dim": 32,
}


@pytest.mark.parametrize("shares", SHARES)
def test_all_exchanges_give_the_same_bits_in_layers_that_run_as_one_program(
    llama_checkpoint: Callable[..., Path], make_runner: Callable[..., ModelRunner], shares: str
) -> None:
    path = llama_checkpoint(**WIDE)
    if make_runner(path, torch.bfloat16)._weights.fused is None:
        pytest.skip("no code for this CPU")
    found: list[Tensor] = []
    for way in Exchange:
        with ranks(path, SHARES[shares], split="sequence", way=way, dtype=torch.bfloat16) as cut:
            assert all(cut.runner(rank)._weights.fused is not None for rank in range(len(SHARES[shares])))
            found.append(cut.log_probs(TOKEN_IDS, RUNS))
    assert all(torch.equal(one, found[0]) for one in found)
    with ranks(path, (1,)) as exact, ranks(path, (1,), dtype=torch.bfloat16) as rounded:
        expected, whole = exact.log_probs(TOKEN_IDS, RUNS), rounded.log_probs(TOKEN_IDS, RUNS)
    assert (found[0] - expected).norm() < 1.5 * (whole - expected).norm()
