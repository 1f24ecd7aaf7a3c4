"""A replica for prompts and one for answers under random arrivals, in virtual time, as the gateway decides."""

import heapq
import itertools
import random
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from placement.planning.limits import ReplicaLimits
from placement.planning.plan import Role
from placement.serving.routing.binding import Waiting, bind
from placement.serving.routing.choice import ReplicaLoad, Route
from placement.serving.routing.router import Disaggregation, Prompt, Router
from placement.serving.step_plan import StepLoad

LIMITS = ReplicaLimits(block_size=16, token_budget=256, max_num_seqs=32, prefix_cache=False)
NUM_REQUESTS = 250
LINK_BYTES_PER_S, KV_BYTES = 1e8, 1000


@dataclass
class Work:
    """A sequence at a replica; one whose answer is computed elsewhere goes there after its prompt."""

    number: int
    prompt_left: int
    answer_left: int
    answer_tokens: int
    route: Route


@dataclass
class Replica:
    """Runs steps as the scheduler does: all decodes, then prompts in order, within the budget."""

    name: str
    role: Role
    running: list[Work] = field(default_factory=list)
    step: list[tuple[Work, int]] = field(default_factory=list)
    expected: Counter[int] = field(default_factory=Counter)  # sequences whose keys and values are on the way

    def load(self) -> ReplicaLoad:
        return ReplicaLoad(
            name=self.name,
            accepting=True,
            pending_tokens=sum(max(1, work.prompt_left) for work in self.running),
            num_running=len(self.running),
            num_waiting=0,
            free_blocks=4096,
            total_blocks=4096,
            role=self.role,
            num_moving=self.expected.total(),
        )

    def begin(self) -> tuple[StepLoad, float] | None:
        self.step = [(work, 1) for work in self.running if not work.prompt_left]
        num_decodes, budget = len(self.step), LIMITS.token_budget - len(self.step)
        for work in self.running:
            tokens = min(work.prompt_left, budget)
            if tokens:
                self.step.append((work, tokens))
                budget -= tokens
        if not self.step:
            return None
        prefilled = LIMITS.token_budget - num_decodes - budget
        load = StepLoad(num_decodes=num_decodes, num_prefill_tokens=prefilled)
        return load, 0.01 + 0.001 * prefilled + 0.0002 * num_decodes


class Simulation:
    """Serves requests that arrive at random.

    Attributes:
        first_s: seconds until the first token, by request.
        whole_s: seconds until the last one.
        gaps_s: seconds of each step that gave a running sequence a token.
        kinds: how many requests were split, and how many not.
    """

    def __init__(
        self, mode: Disaggregation, roles: tuple[Role, Role], *, rate: float, num_requests: int = NUM_REQUESTS
    ) -> None:
        self.router = Router(LIMITS, mode=mode, kv_bytes_per_token=KV_BYTES)
        self.replicas = {name: Replica(name, role) for name, role in zip(("a", "b"), roles, strict=True)}
        self.first_s: dict[int, float] = {}
        self.whole_s: dict[int, float] = {}
        self.gaps_s: list[float] = []
        self.kinds: Counter[bool] = Counter()
        self._arrived_s: dict[int, float] = {}
        self._waiting: list[Waiting] = []
        self._answers: dict[int, int] = {}
        self._steps: dict[str, tuple[StepLoad, float]] = {}
        self._events: list[tuple[float, int, str, object]] = []
        self._count = itertools.count()
        drawn, at_s = random.Random(7), 0.0
        for number in range(num_requests):
            at_s += drawn.expovariate(rate)
            prompt = Prompt(token_ids=range(drawn.randint(100, 800)), max_tokens=400)
            self._answers[number] = drawn.randint(100, 300)
            self._push(at_s, "arrives", Waiting(number=number, prompt=prompt))

    def run(self) -> "Simulation":
        while self._events:
            now_s, _, kind, what = heapq.heappop(self._events)
            if isinstance(what, Waiting):
                self._arrived_s[what.number] = now_s
                self._waiting.append(what)
            elif isinstance(what, Work):
                self.replicas[what.route.replica].expected.pop(what.number)
                self.replicas[what.route.replica].running.append(what)
            else:
                self._end_step(self.replicas[kind], now_s)
            self._bind()
            for replica in self.replicas.values():
                if replica.name not in self._steps and (step := replica.begin()) is not None:
                    self._steps[replica.name] = step
                    self._push(now_s + step[1], replica.name, None)
        assert not self._waiting and len(self.first_s) == len(self._answers), "every request is served"
        return self

    def _push(self, at_s: float, kind: str, what: object) -> None:
        heapq.heappush(self._events, (at_s, next(self._count), kind, what))

    def _bind(self) -> None:
        if not self._waiting:
            return
        loads = [replica.load() for replica in self.replicas.values()]
        num_tokens = sum(len(request.prompt.token_ids) for request in self._waiting)
        self.router.balance(loads, waiting_tokens=num_tokens, num_waiting=len(self._waiting))
        found = bind(self._waiting, loads, LIMITS, self.router.choose)
        for request in self._waiting:
            route = found.bound.get(request.number)
            if route is None:
                continue
            self.router.sent(route, loads, request.prompt)
            self.kinds[route.prefill is not None] += 1
            answer, length = self._answers[request.number], len(request.prompt.token_ids)
            if route.prefill is None:
                self.replicas[route.replica].running.append(Work(request.number, length, answer, answer, route))
            else:
                self.replicas[route.prefill].running.append(Work(request.number, length - 1, answer, answer, route))
                self.replicas[route.replica].expected[request.number] = 1
        self._waiting = [request for request in self._waiting if request.number not in found.bound]

    def _end_step(self, replica: Replica, now_s: float) -> None:
        ended = []
        load, duration_s = self._steps.pop(replica.name)
        for work, tokens in replica.step:
            if work.prompt_left:
                work.prompt_left -= tokens
                if work.prompt_left:
                    continue
                if replica.name == work.route.prefill:
                    self._send(replica, work, now_s)
                    continue
                self.first_s[work.number] = now_s - self._arrived_s[work.number]
            else:
                self.gaps_s.append(duration_s)
            work.answer_left -= 1
            if not work.answer_left:
                ended.append(work.answer_tokens)
                self.whole_s[work.number] = now_s - self._arrived_s[work.number]
                replica.running.remove(work)
        self.router.stepped(replica.name, load, duration_s, ended)

    def _send(self, replica: Replica, work: Work, now_s: float) -> None:
        replica.running.remove(work)
        work.prompt_left = 1
        exposed_s = 0.002 + 400 * KV_BYTES / LINK_BYTES_PER_S
        self.router.transferred(
            replica.name, work.route.replica, num_tokens=400, num_bytes=400 * KV_BYTES, exposed_s=exposed_s
        )
        self._push(now_s + exposed_s, "comes", work)


def p(share: float, values: list[float]) -> float:
    return float(np.percentile(values, share))


def test_pools_keep_prompts_out_of_the_way_of_answers() -> None:
    alone = Simulation("never", (Role.MIXED, Role.MIXED), rate=1.2).run()
    pools = Simulation("auto", (Role.PREFILL, Role.DECODE), rate=1.2).run()
    assert pools.kinds[True] > 0.5 * NUM_REQUESTS and not alone.kinds[True]
    assert p(99, pools.gaps_s) < 0.1 * p(99, alone.gaps_s), "a token waits for no prompt"
    assert p(50, list(pools.first_s.values())) < 2.0 * p(50, list(alone.first_s.values()))


def test_more_prompts_than_their_pool_can_compute_are_computed_by_the_other_too() -> None:
    always = Simulation("always", (Role.PREFILL, Role.DECODE), rate=4.0, num_requests=100).run()
    auto = Simulation("auto", (Role.PREFILL, Role.DECODE), rate=4.0, num_requests=100).run()
    assert auto.kinds[False] and auto.kinds[True]
    assert p(90, list(auto.first_s.values())) < 0.5 * p(90, list(always.first_s.values()))


def test_mixed_replicas_lose_nothing_where_requests_may_be_split() -> None:
    never, auto = (Simulation(mode, (Role.MIXED, Role.MIXED), rate=2.0).run() for mode in ("never", "auto"))
    for auto_s, never_s in ((auto.first_s, never.first_s), (auto.whole_s, never.whole_s)):
        assert p(90, list(auto_s.values())) <= 1.1 * p(90, list(never_s.values()))
