"""Steps that a driver lays out itself, with no scheduler: decodes of some sequences, or the chunks of one prompt.

Owns which slots they use, and how they are timed. Steps are dispatched as the engine does: of one stage the next is
prepared while the last executes; of a pipeline a sequence is in one step at a time, and several batches are on their
way, or several chunks of a prompt.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from workers.engine.types import Runner
from workers.sampling.sampling import SamplerState, SamplingParams
from workers.step.types import Batch, SequenceInput, StepResult

# Longest that a step may take: ranks that hang are found out sooner.
_STEP_S = 120.0
_FIRST_ID, _NUM_IDS = 3, 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is timed.

    Attributes:
        phase: ``decode``: from the end of the first step of all sequences, for ``num_steps`` more.
            ``prefill``: from the first preparation until the token after the chunk is sampled.
        num_tokens: of the chunk; or in the cache of each sequence, before its first decode.
        num_sequences: that decode.
        start: tokens in the cache before the chunk.
        num_parts: batches that the sequences are dealt out to, or pieces that the chunk is cut into.
    """

    phase: Literal["prefill", "decode"]
    num_tokens: int
    num_sequences: int = 1
    num_steps: int = 1
    start: int = 0
    num_parts: int = 1

    def __post_init__(self) -> None:
        assert self.num_parts <= (self.num_sequences if self.phase == "decode" else self.num_tokens), self
        assert self.phase == "decode" or self.num_sequences == 1, self

    @property
    def name(self) -> str:
        """``decode_b8``, ``prefill_512``."""
        return f"decode_b{self.num_sequences}" if self.phase == "decode" else f"prefill_{self.num_tokens}"

    @property
    def num_timed(self) -> int:
        """Steps of each sequence that the time is shared by."""
        return self.num_steps if self.phase == "decode" else 1

    @property
    def num_warm(self) -> int:
        """Batches before the time begins."""
        return self.num_parts if self.phase == "decode" else 0


def num_slots(workload: Workload, block_size: int) -> int:
    """Slots that it needs, in whole blocks."""
    return workload.num_sequences * _stride(workload, block_size)


def _stride(workload: Workload, block_size: int) -> int:
    """Slots of each sequence."""
    new = workload.num_steps + 1 if workload.phase == "decode" else workload.start
    return -(-(workload.num_tokens + new) // block_size) * block_size


def batches(workload: Workload, block_size: int) -> Iterator[Batch]:
    """Its steps, in their order."""
    if workload.phase == "decode":
        yield from _decodes(workload, block_size)
    else:
        yield from _chunks(workload)


def _decodes(workload: Workload, block_size: int) -> Iterator[Batch]:
    samplers = [SamplerState(SamplingParams(), ()) for _ in range(workload.num_sequences)]
    stride = _stride(workload, block_size)
    for step in range(workload.num_steps + 1):
        start = workload.num_tokens + step
        for part in range(workload.num_parts):
            yield Batch(
                sequences=tuple(
                    SequenceInput(
                        token_ids=[] if step else [_FIRST_ID + number],
                        awaits_token=step > 0,
                        start=start,
                        runs=((number * stride, number * stride + start + 1),),
                        sampler=samplers[number],
                        samples=True,
                    )
                    for number in range(part, workload.num_sequences, workload.num_parts)
                )
            )


def _chunks(workload: Workload) -> Iterator[Batch]:
    edges = [workload.start + workload.num_tokens * part // workload.num_parts for part in range(workload.num_parts)]
    stop = workload.start + workload.num_tokens
    for start, end in zip(edges, [*edges[1:], stop], strict=True):
        is_last = end == stop
        sequence = SequenceInput(
            token_ids=[_FIRST_ID + at % _NUM_IDS for at in range(start, end)],
            start=start,
            runs=((0, end),),
            sampler=SamplerState(SamplingParams(), ()) if is_last else None,
            samples=is_last,
        )
        yield Batch(sequences=(sequence,))


def most_ahead(workload: Workload, num_stages: int) -> int:
    """Steps that are dispatched and not done."""
    return 2 if num_stages == 1 else min(workload.num_parts, num_stages + 1)


def time_steps(
    leader: Runner, executor: ThreadPoolExecutor, steps: Iterable[Batch], *, ahead: int, num_warm: int
) -> float:
    """Seconds from the end of the first ``num_warm`` steps to that of the last.

    Args:
        executor: what executes steps.
        ahead: steps that may be dispatched and not done.

    Raises:
        What a step raises; TimeoutError.
    """
    on_way: deque[Future[StepResult]] = deque()
    began_s = time.perf_counter()

    def collect() -> None:
        nonlocal num_warm, began_s
        on_way.popleft().result(_STEP_S)
        num_warm -= 1
        if num_warm == 0:
            began_s = time.perf_counter()

    for batch in steps:
        if len(on_way) == ahead:
            collect()
        on_way.append(executor.submit(leader.prepare(batch)))
    while on_way:
        collect()
    return time.perf_counter() - began_s
