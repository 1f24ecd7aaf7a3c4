"""Steps in two micro-batches, one computed while the other's sums are on their way: the same numbers as in one."""

import random
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.attention import SharedSpan
from kernels.cpu.layers.partial import Partial
from placement.measured.overlap import OverlapTable
from tests.support.oracle import CHECKPOINTS, WIDE, continue_greedily
from tests.support.ranks import Ranks, ranks
from workers.model.overlapped import run_alone, run_overlapped
from workers.step.runner import ModelRunner
from workers.step.scoring import ScoredPrompt
from workers.step.types import Batch, SequenceInput

ALWAYS = OverlapTable(num_tokens=(1, 1 << 20), alone_s=(1.0, 1.0), overlapped_s=(0.5, 0.5))
TOKEN_IDS = [i * 31 % 509 for i in range(150)]
RUNS = ((7, 157),)
PROMPTS = [[random.Random(length).randrange(509) for _ in range(length)] for length in (90, 3, 200, 41)]


def counted(name: str, count: int, log: list[str]) -> Generator[Partial, None, Tensor]:
    for number in range(count):
        log.append(f"{name}{number}")
        yield Partial(update=torch.tensor(number))
    return torch.tensor(count)


def test_lanes_take_turns_and_the_first_is_ahead() -> None:
    log: list[str] = []

    def begin(x: Partial) -> Future[None]:
        done: Future[None] = Future()
        done.set_result(None)
        log.append(f"+{int(x.update)}")
        return done

    outputs = run_overlapped([counted("a", 2, log), counted("b", 2, log)], begin)
    assert log == ["a0", "+0", "b0", "+0", "a1", "+1", "b1", "+1"]
    assert [int(output) for output in outputs] == [2, 2]


def test_a_lane_waits_for_its_own_sum_only() -> None:
    begun: list[Future[None]] = []

    def begin(_: Partial) -> Future[None]:
        if begun:  # the other micro-batch has computed: now the first's sum is there
            begun[-1].set_result(None)
        begun.append(Future())
        if len(begun) == 4:
            begun[-1].set_result(None)
        return begun[-1]

    run_overlapped([counted("a", 2, []), counted("b", 2, [])], begin)
    assert len(begun) == 4


def test_what_a_sum_raises_ends_the_step() -> None:
    def begin(_: Partial) -> Future[None]:
        failed: Future[None] = Future()
        failed.set_exception(OSError("lost"))
        return failed

    with pytest.raises(OSError, match="lost"):
        run_overlapped([counted("a", 2, []), counted("b", 2, [])], begin)


def test_alone_every_sum_is_waited_for() -> None:
    log: list[str] = []
    assert int(run_alone(counted("a", 2, log), lambda x: log.append(f"+{int(x.update)}"))) == 2
    assert log == ["a0", "+0", "a1", "+1"]


LAYOUTS: dict[str, tuple[tuple[int, ...], ...]] = {"3:1": ((3, 1),), "5:2:1": ((5, 2, 1),), "stages": ((2, 1), (1, 1))}


@pytest.fixture(
    scope="module", params=[(layout, name) for layout in LAYOUTS for name in ("plain", "mistral", "gemma3")]
)
def cut(request: pytest.FixtureRequest, checkpoint: Callable[..., Path]) -> Iterator[Ranks]:
    layout, name = request.param
    family, config = CHECKPOINTS[name]
    with ranks(checkpoint(family, **config), *LAYOUTS[layout]) as made:
        yield made


def overlapped(cut: Ranks, *, always: bool) -> None:
    for rank in range(cut.num_ranks):
        cut.runner(rank).overlap = ALWAYS if always and cut.membership(rank).group.sums else OverlapTable()


def test_greedy_tokens_and_log_probabilities_are_the_same_woven_or_not(cut: Ranks) -> None:
    found = []
    for always in (False, True):
        overlapped(cut, always=always)
        log_probs = cut.log_probs(TOKEN_IDS, RUNS)
        found.append((log_probs, continue_greedily(cut, PROMPTS, chunk_size=96, num_outputs=12)))
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-5, rtol=1e-5)
    assert found[1][1] == found[0][1]


def test_layers_that_run_as_one_program_give_the_same_bits_in_two(
    llama_checkpoint: Callable[..., Path], make_runner: Callable[..., ModelRunner]
) -> None:
    path = llama_checkpoint(**WIDE)
    if make_runner(path, torch.bfloat16)._weights.fused is None:
        pytest.skip("no code for this CPU")
    with ranks(path, (3, 1), dtype=torch.bfloat16) as cut:
        found = []
        for always in (False, True):
            overlapped(cut, always=always)
            found.append(cut.log_probs(TOKEN_IDS, RUNS))
            found.append(cut.log_probs(TOKEN_IDS[:90], ((7, 97),)))
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])


def test_ranks_measure_the_same_table_when_they_start(llama_checkpoint: Callable[..., Path]) -> None:
    with ranks(llama_checkpoint(), (2, 1), measures=True) as cut:
        tables = [cut.runner(rank).overlap for rank in range(2)]
    assert tables[0] == tables[1]
    assert tables[0].num_tokens == (64, 128, 256)
    assert all(seconds > 0 for seconds in (*tables[0].alone_s, *tables[0].overlapped_s))


def test_the_leader_weaves_only_steps_that_lanes_can_share(llama_checkpoint: Callable[..., Path]) -> None:
    with ranks(llama_checkpoint(), (1, 1)) as cut:
        runner = cut.runner(0)

        def is_overlapped(*num_tokens: int) -> bool:
            sequences = [
                SequenceInput(token_ids=[0] * count, start=0, runs=((at * 512, at * 512 + count),))
                for at, count in enumerate(num_tokens)
            ]
            micro_batches = runner.lay_out(Batch(sequences=tuple(sequences))).micro_batches
            assert sum(len(micro_batch.token_ids) for micro_batch in micro_batches) == (
                sum(num_tokens) if micro_batches else 0
            )
            assert all(len(micro_batch.token_ids) >= 32 for micro_batch in micro_batches)
            return bool(micro_batches)

        assert not is_overlapped(100)  # nothing is measured yet
        runner.overlap = ALWAYS
        assert is_overlapped(100) and is_overlapped(*[1] * 20, 80) and is_overlapped(*[1] * 64) and is_overlapped(65)
        assert not is_overlapped(20) and not is_overlapped(*[1] * 63)


def test_decodes_of_both_lanes_share_what_they_have_in_common(llama_checkpoint: Callable[..., Path]) -> None:
    """Seventy decodes: thirty share a prefix, most of them in the first micro-batch, and the last thirty another."""
    prefixes = ((0, 1024), (1024, 2048))
    members = ((*range(29), 39), tuple(range(40, 70)))
    shared = tuple(
        SharedSpan(members=its, first_token=0, num_tokens=1024, runs=(prefix,))
        for its, prefix in zip(members, prefixes, strict=True)
    )
    sequences = []
    for at in range(70):
        own = (2048 + 8 * at, 2048 + 8 * at + 1)
        runs = (prefixes[0], own) if at in members[0] else (prefixes[1], own) if at in members[1] else (own,)
        scored = ScoredPrompt(first_index=1025, token_ids=[1], num_top=509) if len(runs) == 2 else None
        start = 1024 if len(runs) == 2 else 0
        sequences.append(SequenceInput(token_ids=[7 + at], start=start, runs=runs, scored=scored))
    batch = Batch(sequences=tuple(sequences), shared=shared)
    with ranks(llama_checkpoint(max_position_embeddings=2048), (1, 1)) as cut:
        found = []
        for always in (False, True):
            overlapped(cut, always=always)
            for prefix, first in zip(prefixes, (3, 7), strict=True):
                cut.log_probs([first + at % 500 for at in range(1024)], (prefix,))
            micro_batches = cut.runner(0).lay_out(batch).micro_batches
            assert [len(micro_batch.token_ids) for micro_batch in micro_batches] == ([32, 38] if always else [])
            found.append({at: dict(scores.top[0]) for at, scores in cut.prepare(batch)().scores.items()})
    assert found[0].keys() == found[1].keys() and len(found[0]) == 60
    for at, alone in found[0].items():
        assert alone.keys() == found[1][at].keys()
        assert all(abs(alone[token] - found[1][at][token]) < 1e-4 for token in alone), at


def test_a_prompt_of_which_one_token_is_left_shares_with_decodes_of_the_other_lane(
    llama_checkpoint: Callable[..., Path],
) -> None:
    """Twenty decodes share a prefix; so does a prompt behind a long chunk, which all but its last token is known of."""
    shared = SharedSpan(members=(*range(20), 21), first_token=0, num_tokens=1024, runs=((0, 1024),))
    behind = [((0, 1024), (1024 + 8 * at, 1024 + 8 * at + 1)) for at in range(21)]
    decodes = [SequenceInput(token_ids=[7 + at], start=1024, runs=behind[at]) for at in range(20)]
    chunk = SequenceInput(token_ids=TOKEN_IDS[:100], start=0, runs=((2000, 2100),))
    last = SequenceInput(
        token_ids=[5], start=1024, runs=behind[20], scored=ScoredPrompt(first_index=1025, token_ids=[1], num_top=509)
    )
    batch = Batch(sequences=(*decodes, chunk, last), shared=(shared,))
    with ranks(llama_checkpoint(max_position_embeddings=2048), (1, 1)) as cut:
        found = []
        for always in (False, True):
            overlapped(cut, always=always)
            cut.log_probs(list(range(3, 500)) * 2 + TOKEN_IDS[:30], ((0, 1024),))  # the prefix
            assert bool(cut.runner(0).lay_out(batch).micro_batches) is always
            found.append(dict(cut.prepare(batch)().scores[21].top[0]))
    assert found[0].keys() == found[1].keys()
    assert all(abs(found[0][token] - found[1][token]) < 1e-4 for token in found[0])
