"""A model cut over ranks by weight, against transformers: same logits, same greedy tokens, for every family."""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from placement.errors import InvalidModel
from placement.model.part import Part, Span
from placement.model.quantization import Bits, LinearFormat, check_linear_format
from placement.model.weights import shard_tensors
from tests.support.oracle import CHECKPOINTS, WIDE, continue_greedily, greedy_each, oracle_logits
from tests.support.ranks import Ranks, ranks, read_model
from tests.support.steps import logits
from workers.step.runner import ModelRunner
from workers.step.types import SequenceInput

# Stages, each of ranks with these shares.
SPLITS: dict[str, tuple[tuple[int, ...], ...]] = {
    "even": ((1, 1),),
    "3:1": ((3, 1),),
    "5:2:1": ((5, 2, 1),),
    "zero": ((0, 2, 1),),
    "zero_last": ((1, 0),),
    "two stages": ((1,), (1,)),
    "two stages of two": ((1, 1), (3, 1)),
    "two and one": ((2, 1), (1,)),
}
NUM_OUTPUTS = 24
TOKEN_IDS = [i * 31 % 509 for i in range(120)]
RUNS = ((7, 127),)
PROMPTS = {length: [random.Random(length).randrange(509) for _ in range(length)] for length in (1, 17, 70)}


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


@pytest.fixture(scope="module", params=SPLITS)
def split(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(scope="module")
def cut(split: str, path: Path) -> Iterator[Ranks]:
    with ranks(path, *SPLITS[split]) as made:
        yield made


def test_log_probabilities_of_every_position_match(cut: Ranks, oracle: PreTrainedModel) -> None:
    expected = oracle_logits(oracle, TOKEN_IDS).log_softmax(dim=-1)
    torch.testing.assert_close(cut.log_probs(TOKEN_IDS, RUNS), expected, atol=1e-4, rtol=1e-4)


def test_greedy_tokens_match(cut: Ranks, answers: list[list[int]], name: str, split: str) -> None:
    """Every checkpoint and every split are computed in small chunks and in whole prompts, by turns."""
    chunk_size = (16, 128)[(list(CHECKPOINTS).index(name) + list(SPLITS).index(split)) % 2]
    assert continue_greedily(cut, list(PROMPTS.values()), chunk_size, NUM_OUTPUTS) == answers


def whole(runner: ModelRunner) -> Tensor:
    """What one rank has in place of :meth:`Ranks.log_probs`."""
    batch = [SequenceInput(token_ids=TOKEN_IDS, start=0, runs=RUNS)]
    return logits(runner, batch).float().log_softmax(dim=-1)


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (2, 1, 1)])
def test_layers_that_run_as_one_program_stop_for_every_sum(
    llama_checkpoint: Callable[..., Path], make_runner: Callable[..., ModelRunner], weights: tuple[int, ...]
) -> None:
    """In bfloat16 partial sums are rounded, so bits differ from those of one rank; no more than its own do."""
    path = llama_checkpoint(**WIDE)
    if make_runner(path, torch.bfloat16)._weights.fused is None:
        pytest.skip("no code for this CPU")
    exact, rounded = (whole(make_runner(path, dtype)) for dtype in (torch.float32, torch.bfloat16))
    with ranks(path, weights, dtype=torch.bfloat16) as cut:
        assert all(cut.runner(rank)._weights.fused is not None for rank in range(len(weights)))
        found = cut.log_probs(TOKEN_IDS, RUNS)
    assert (found - exact).norm() < 1.5 * (rounded - exact).norm()


@pytest.mark.parametrize("bits", [8, 4])
def test_rounded_weights_are_those_of_one_rank(
    llama_checkpoint: Callable[..., Path], make_runner: Callable[..., ModelRunner], bits: Bits
) -> None:
    linear = LinearFormat(bits=bits, head_bits=8)
    path = llama_checkpoint(**WIDE)
    with ranks(path, (1,), linear=linear) as one, ranks(path, (3, 1), linear=linear) as two:
        expected, found = one.log_probs(TOKEN_IDS, RUNS), two.log_probs(TOKEN_IDS, RUNS)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(expected, whole(make_runner(path)), atol=1e-4, rtol=1e-4)


def test_a_cut_through_a_group_of_rounded_columns_is_refused(llama_checkpoint: Callable[..., Path]) -> None:
    model = read_model(llama_checkpoint(**WIDE))
    part = replace(Part.whole(model), ffn_columns=Span(0, 100))
    with pytest.raises(InvalidModel, match=r"down_proj.*multiple of 128"):
        check_linear_format(shard_tensors(model, part), LinearFormat(bits=4))
