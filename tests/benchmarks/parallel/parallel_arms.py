"""How the parallel benchmark's measurements are sized, and how arms take turns."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tests.benchmarks.parallel.hosts.parallel_hosts import BLOCK_SIZE
from tests.benchmarks.parallel.parallel_steps import Workload, num_slots


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How large the measurements are.

    Attributes:
        delays_s: one way, of the links.
        key_delay_s: the one of ``delays_s`` that what is measured at one alone is measured at.
        context: tokens in the cache of each sequence that decodes; ``steps``: that are timed at a time.
        prefill: tokens of the step of which sums are hidden.
        lengths: of prefills, ascending, whose lanes are chosen.
        share_batches: sequences that decode, whose throughput over unequal hosts is measured.
        slow_share: of a core, that the slower of two unequal hosts has.
        chunks: of sequences whose ranks choose an exchange: tokens of each, and tokens before it.
        plan_batches, plan_prefills: of the workloads that plans are compared by.
    """

    repeats: int
    delays_s: Sequence[float]
    context: int = 128
    steps: int = 16
    prefill: int = 2048
    lengths: Sequence[int] = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
    share_batches: Sequence[int] = (8, 64)
    slow_share: float = 0.4
    chunks: Sequence[tuple[int, int]] = ((1024, 0), (256, 3072))
    plan_batches: Sequence[int] = (1, 8)
    plan_prefills: Sequence[int] = (128, 512)

    @property
    def key_delay_s(self) -> float:
        """1 ms, where that is measured."""
        return min(self.delays_s, key=lambda delay_s: abs(delay_s - 1e-3))

    def decode(self, batch: int, *, parts: int = 1) -> Workload:
        """Decodes of so many sequences."""
        return Workload(
            phase="decode", num_tokens=self.context, num_sequences=batch, num_steps=self.steps, num_parts=parts
        )

    def slots(self, *workloads: Workload) -> int:
        """That the largest of them needs."""
        return max(num_slots(workload, BLOCK_SIZE) for workload in workloads)


def prefill(num_tokens: int, *, start: int = 0, parts: int = 1) -> Workload:
    """A chunk of a prompt."""
    return Workload(phase="prefill", num_tokens=num_tokens, start=start, num_parts=parts)


Arms = Mapping[str, Callable[[], float]]


def take_turns(arms: Arms, repeats: int) -> dict[str, list[float]]:
    """Samples of each arm: one of each in every repeat, whose order turns, after a round that is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for repeat in range(repeats + 1):
        turn = repeat % len(names)
        for name in [*names[turn:], *names[:turn]]:
            seconds = arms[name]()
            print(f"{repeat}/{repeats} {name:>24} {1e3 * seconds:10.2f} ms", flush=True)
            if repeat:
                taken[name].append(seconds)
    return taken
