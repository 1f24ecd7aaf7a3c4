"""Sums whose rows are scattered: each rank norms its own and all gather the results. The same bits as without."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from placement.measured.collectives import AllReduceTable
from placement.measured.overlap import OverlapTable
from tests.support.oracle import CHECKPOINTS, WIDE, continue_greedily, greedy_each, oracle_logits
from tests.support.ranks import Ranks, ranks
from workers.collectives import group as groups
from workers.step.runner import ModelRunner

TOKEN_IDS = [i * 31 % 509 for i in range(150)]
RUNS = ((7, 157),)
NUM_OUTPUTS = 8
PROMPTS = [TOKEN_IDS[:1], TOKEN_IDS[3:20], TOKEN_IDS[30:100]]
LAYOUTS: dict[str, tuple[tuple[int, ...], ...]] = {"3:1": ((3, 1),), "5:2:1": ((5, 2, 1),), "stages": ((2, 1), (1, 1))}
OVERLAPPED = OverlapTable(num_tokens=(1, 1 << 20), alone_s=(1.0, 1.0), overlapped_s=(0.5, 0.5))


def sums_by(cut: Ranks, name: str, *, overlapped: bool = False) -> Ranks:
    """The same ranks, which sum all sizes in one way from now on."""
    for rank in range(cut.num_ranks):
        cut.membership(rank).group.table = AllReduceTable(sizes=(1,), names=(name,))
        cut.runner(rank).overlap = OVERLAPPED if overlapped and cut.membership(rank).group.sums else OverlapTable()
    return cut


@pytest.fixture(scope="module", params=CHECKPOINTS)
def path(request: pytest.FixtureRequest, checkpoint: Callable[..., Path]) -> Path:
    family, config = CHECKPOINTS[request.param]
    return checkpoint(family, **config)


@pytest.fixture(scope="module")
def oracle(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def answers(oracle: PreTrainedModel) -> list[list[int]]:
    return greedy_each(oracle, PROMPTS, NUM_OUTPUTS)


@pytest.fixture(scope="module", params=LAYOUTS)
def cut(request: pytest.FixtureRequest, path: Path) -> Iterator[Ranks]:
    with ranks(path, *LAYOUTS[request.param]) as made:
        yield made


@pytest.fixture
def num_finished(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of every sum that ranks finished so."""
    found: list[int] = []

    def counted(peers: groups.Peers, partial: groups.Partial) -> None:
        finish(peers, partial)
        assert partial.is_finished
        most = -(-len(partial.update) // peers.num_ranks)
        assert most * peers.num_ranks <= 1.15 * len(partial.update), "no rank sums many more rows than others"
        found.append(len(partial.update))

    finish = groups.reduce_and_finish
    monkeypatch.setattr(groups, "reduce_and_finish", counted)
    return found


@pytest.mark.parametrize("overlapped", [False, True])
def test_every_family_computes_what_transformers_does(
    cut: Ranks, oracle: PreTrainedModel, answers: list[list[int]], num_finished: list[int], overlapped: bool
) -> None:
    sums_by(cut, "scatter", overlapped=overlapped)
    found = cut.log_probs(TOKEN_IDS, RUNS)
    expected = oracle_logits(oracle, TOKEN_IDS).log_softmax(dim=-1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert continue_greedily(cut, PROMPTS, 16, NUM_OUTPUTS) == answers
    assert set(num_finished) >= ({64, 86} if overlapped else {len(TOKEN_IDS)})


@pytest.mark.parametrize("overlapped", [False, True])
@pytest.mark.parametrize("shares", [(3, 1), (2, 1, 1)])
def test_layers_that_run_as_one_program_give_the_same_bits(
    llama_checkpoint: Callable[..., Path],
    make_runner: Callable[..., ModelRunner],
    num_finished: list[int],
    shares: tuple[int, ...],
    overlapped: bool,
) -> None:
    path = llama_checkpoint(**WIDE)
    if make_runner(path, torch.bfloat16)._weights.fused is None:
        pytest.skip("no code for this CPU")
    lengths = (2, 33, 150)
    with ranks(path, shares, dtype=torch.bfloat16) as cut:
        found = []
        for name in ("direct", "scatter"):
            sums_by(cut, name, overlapped=overlapped)
            found.append([cut.log_probs(TOKEN_IDS[:count], ((7, 7 + count),)) for count in lengths])
    assert num_finished
    for whole, scattered in zip(*found, strict=True):
        assert torch.equal(whole, scattered)
