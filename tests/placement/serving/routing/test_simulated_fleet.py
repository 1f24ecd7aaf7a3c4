"""Replicas of unequal speed under random arrivals, in virtual time: routing by seconds against routing by tokens."""

import heapq
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from placement.planning.limits import ReplicaLimits
from placement.serving.routing.choice import ReplicaLoad, first_token_s
from placement.serving.routing.router import Prompt, Router
from placement.serving.step_plan import StepLoad

LIMITS = ReplicaLimits(block_size=16, token_budget=256, max_num_seqs=32, prefix_cache=False)
NUM_BLOCKS = 4096


@dataclass
class Work:
    """A request at a replica."""

    arrived_s: float
    prompt_left: int
    answer_left: int
    answer_tokens: int


@dataclass
class SimulatedReplica:
    """Runs steps as the scheduler does: all decodes, then prompts in order, within the budget."""

    name: str
    slowness: float
    limits: ReplicaLimits
    waiting: deque[Work] = field(default_factory=deque)
    running: list[Work] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    step: list[tuple[Work, int]] = field(default_factory=list)

    def load(self) -> ReplicaLoad:
        everything = [*self.running, *self.waiting]
        return ReplicaLoad(
            name=self.name,
            accepting=True,
            pending_tokens=sum(max(1, work.prompt_left) for work in everything),
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            free_blocks=NUM_BLOCKS,
            total_blocks=NUM_BLOCKS,
        )

    def begin(self) -> tuple[StepLoad, float] | None:
        """Plans a step; returns its size and its time, or None where there is nothing to do."""
        while self.waiting and len(self.running) < self.limits.max_num_seqs:
            self.running.append(self.waiting.popleft())
        self.step = [(work, 1) for work in self.running if not work.prompt_left]
        decodes, budget = len(self.step), self.limits.token_budget - len(self.step)
        for work in self.running:
            tokens = min(work.prompt_left, budget)
            if tokens:
                self.step.append((work, tokens))
                budget -= tokens
        if not self.step:
            return None
        prefilled = self.limits.token_budget - decodes - budget
        seconds = self.slowness * (0.01 + 0.0005 * prefilled + 0.0005 * decodes)
        return StepLoad(num_decodes=decodes, num_prefill_tokens=prefilled), seconds

    def end(self, now_s: float) -> list[int]:
        """Ends the step; returns the lengths of the answers that ended with it."""
        ended = []
        for work, tokens in self.step:
            if work.prompt_left:
                work.prompt_left -= tokens
                if work.prompt_left:
                    continue
                self.first_token_s.append(now_s - work.arrived_s)
            work.answer_left -= 1
            if not work.answer_left:
                ended.append(work.answer_tokens)
                self.running.remove(work)
        return ended


Choose = Callable[[Router, list[ReplicaLoad], Prompt], str]


def simulate(
    choose: Choose,
    *,
    slowness: float,
    seed: int,
    rate: float,
    limits: ReplicaLimits = LIMITS,
    answers: tuple[int, int] = (1, 40),
) -> list[float]:
    """Returns the time to the first token of each request."""
    drawn = random.Random(seed)
    router = Router(limits)
    replicas = {name: SimulatedReplica(name, slow, limits) for name, slow in (("fast", 1.0), ("slow", slowness))}
    events: list[tuple[float, int, str]] = []  # ends of steps by replica, and arrivals, which have no name
    at_s = 0.0
    for number in range(1500):
        at_s += drawn.expovariate(rate)
        events.append((at_s, number, ""))
    heapq.heapify(events)
    running: dict[str, tuple[StepLoad, float]] = {}
    count = len(events)
    while events:
        now_s, _, name = heapq.heappop(events)
        if name:
            router.stepped(name, *running.pop(name), replicas[name].end(now_s))
        else:
            prompt, answer = drawn.randint(20, 800), drawn.randint(*answers)
            loads = [replica.load() for replica in replicas.values()]
            name = choose(router, loads, Prompt(token_ids=range(prompt)))
            replicas[name].waiting.append(Work(now_s, prompt, answer, answer))
        if name not in running and (step := replicas[name].begin()) is not None:
            running[name] = step
            heapq.heappush(events, (now_s + step[1], count, name))
            count += 1
    times = [time_s for replica in replicas.values() for time_s in replica.first_token_s]
    assert len(times) == 1500
    return times


def by_tokens(router: Router, loads: list[ReplicaLoad], prompt: Prompt) -> str:
    return min(loads, key=lambda load: (load.pending_tokens, load.name)).name


def by_time(router: Router, loads: list[ReplicaLoad], prompt: Prompt) -> str:
    route = router.route(loads, prompt)
    assert route is not None
    return route.replica


def p99(times: list[float]) -> float:
    return float(np.percentile(times, 99))


def test_the_99th_percentile_of_first_tokens_at_least_halves_where_one_replica_is_four_times_slower() -> None:
    for seed in (1, 2, 3):
        tokens, time = (p99(simulate(choose, slowness=4.0, seed=seed, rate=2.5)) for choose in (by_tokens, by_time))
        assert time * 2 <= tokens, (seed, time, tokens)


def test_a_fast_replica_whose_places_are_taken_does_not_get_all_requests() -> None:
    limits = replace(LIMITS, max_num_seqs=4)
    simulated = partial(simulate, slowness=4.0, seed=1, rate=1.5, limits=limits, answers=(50, 150))
    tokens, time = (p99(simulated(choose)) for choose in (by_tokens, by_time))
    assert time * 2 <= tokens, (time, tokens)


def test_equal_replicas_lose_nothing_by_it() -> None:
    tokens, time = (p99(simulate(choose, slowness=1.0, seed=4, rate=5.0)) for choose in (by_tokens, by_time))
    assert time <= 1.1 * tokens, (time, tokens)


def test_the_expected_times_come_true_where_requests_come_one_at_a_time() -> None:
    expected: dict[str, list[float]] = {"fast": [], "slow": []}

    def watch(router: Router, loads: list[ReplicaLoad], prompt: Prompt) -> str:
        name = ("fast", "slow")[len(expected["fast"]) > len(expected["slow"])]
        (load,) = (load for load in loads if load.name == name)
        expected[name].append(first_token_s(load, router.speed(name), len(prompt.token_ids), LIMITS))
        return name

    taken = simulate(watch, slowness=4.0, seed=5, rate=0.01)
    for times, guessed in zip((taken[:750], taken[750:]), expected.values(), strict=True):
        # The first few steps teach it.
        np.testing.assert_allclose(times[20:], guessed[20:], rtol=0.01)
