"""Has the designs of the Splitwise paper served by our cores, with the shortcuts that its own simulator takes.

The time of a step depends on its tokens alone, whatever their contexts. A step of prompts and tokens takes a tenth
longer than one of as many prompt tokens. Prompts are not cut. Keys and values take a time by themselves, at 200 GB/s,
whatever else is on its way, and the first token comes with the prompt.
"""

import csv
import gzip
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from placement.planning.limits import ReplicaLimits
from placement.serving.admission import Limits
from placement.serving.routing.binding import Waiting
from placement.serving.routing.choice import ReplicaLoad, Route
from placement.serving.settings import CoreSettings
from placement.serving.step_plan import Chunk, SchedulerLimits, StepPlan
from placement.simulation.load import OpenLoop, Request
from placement.simulation.replica import SimulatedReplica
from placement.simulation.results import Result
from placement.simulation.simulation import Fleet, Simulation
from placement.simulation.step_time import StepTime
from placement.simulation.tables import Table

KV_BYTES_PER_TOKEN = 2 * 14336 * 70 * 2
WEIGHT_BYTES = 352 * 2**30
MACHINE_BYTES = 8 * 80 * 2**30
LINK_BYTES_PER_S = 200 * 2**30
MOST_BATCH_TOKENS = 2048
_BLOCK_SIZE = 64
_UNCUT = 1 << 20
_MOST_OWED = 0.1
_SLOS = {"ttft": (2.0, 3.0, 6.0), "tbt": (1.25, 1.5, 5.0), "e2e": (1.25, 1.5, 5.0)}


Trace = Sequence[tuple[float, int, int]]
"""When each request comes, and the tokens of its prompt and of its answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The times of one type of machine, by the tokens of a step."""

    prompt: Table
    token: Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """So many machines of a type, for prompts and for tokens; without the latter all do both."""

    prompt: tuple[str, int]
    token: tuple[str, int] | None = None


A100, H100, H100_CAPPED = "a100-80gb", "h100-80gb", "h100-80gb-pcap"
ISO_POWER = {
    "BA": Design(prompt=(A100, 70)),
    "BH": Design(prompt=(H100, 40)),
    "AA": Design(prompt=(A100, 45), token=(A100, 25)),
    "HH": Design(prompt=(H100, 25), token=(H100, 15)),
    "HA": Design(prompt=(H100, 25), token=(A100, 26)),
    "HHcap": Design(prompt=(H100, 25), token=(H100_CAPPED, 21)),
}


def read_machines(path: Path) -> dict[str, Machine]:
    """Reads the measured times; of measurements of equal size the median counts."""
    times: dict[str, dict[str, dict[int, list[float]]]] = defaultdict(lambda: {"prompt": {}, "token": {}})
    for row in _rows(path):
        size = int(row["prompt_size"]) * int(row["batch_size"])
        for kind in ("prompt", "token"):
            times[row["hardware"]][kind].setdefault(size, []).append(float(row[f"{kind}_time"]) * 1e-3)
    return {
        hardware: Machine(**{kind: _median_table(sizes) for kind, sizes in kinds.items()})
        for hardware, kinds in times.items()
    }


def _median_table(sizes: Mapping[int, Sequence[float]]) -> Table:
    return Table([((size,), statistics.median(seconds)) for size, seconds in sizes.items()])


class TokenSteps:
    """Takes the time that the tokens of a step take, prompts or not, whatever their contexts.

    In the published simulator, tokens that do not fit in a batch with prompts wait for the next one. Here they are in
    the step all the same, without taking time there; the next steps without prompts take a little longer instead.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._known: dict[int, StepTime] = {}
        self._owed_s = 0.0

    def step_time(self, chunks: Sequence[Chunk]) -> StepTime:
        """Returns the time of a step."""
        num_prompt = sum(chunk.num_tokens for chunk in chunks if not chunk.is_decode and chunk.num_tokens > 1)
        if num_prompt:
            num_single = sum(chunk.num_tokens for chunk in chunks) - num_prompt
            return self._with_prompts(num_prompt, num_single)
        found = self._known.get(len(chunks))
        if found is None:
            found = self._known[len(chunks)] = StepTime(*self._machine.token.read(len(chunks)))
        if self._owed_s:
            more_s = min(self._owed_s, _MOST_OWED * found.seconds)
            self._owed_s -= more_s
            return StepTime(found.seconds + more_s, found.is_measured)
        return found

    def _with_prompts(self, num_prompt: int, num_single: int) -> StepTime:
        num_fitting = min(num_single, max(0, MOST_BATCH_TOKENS - num_prompt))
        if num_fitting < num_single:
            self._owed_s += self._machine.token.read(num_single).value * (1 - num_fitting / num_single)
        reading = self._machine.prompt.read(num_prompt + num_fitting)
        return StepTime(reading.value * (1.1 if num_fitting else 1.0), reading.is_measured)


class PendingTokens:
    """Joins the shortest queue, in tokens; answers to prompts that were computed elsewhere go where the fewest are.

    Prompts are uncut: a replica is given at most a batch of them at a time, or one.
    """

    def __init__(self, prompts: Sequence[str], tokens: Sequence[str], limits: ReplicaLimits) -> None:
        self.limits = limits
        self._is_split = bool(tokens)
        self._pending = dict.fromkeys(prompts, 0)  # tokens of prompts to compute, and one for each answer
        self._given = dict.fromkeys(prompts, 0)  # tokens of prompts that were given and not computed
        self._num_answers = dict.fromkeys(tokens, 0)
        self._chosen: dict[int, str] = {}

    def bind(self, waiting: Sequence[Waiting], loads: Sequence[ReplicaLoad]) -> Mapping[int, Route]:
        """Gives each request to the replica that was chosen when it came, once that may compute its prompt."""
        bound: dict[int, Route] = {}
        full: set[str] = set()
        for request in waiting:
            name = self._choose_answering() if request.number < 0 else self._choose(request, full)
            if name is not None:
                bound[request.number] = Route(replica=name, reason="its queue is the shortest")
        return bound

    def _choose_answering(self) -> str:
        name = min(self._num_answers, key=self._num_answers.__getitem__)
        self._num_answers[name] += 1
        return name

    def _choose(self, request: Waiting, full: set[str]) -> str | None:
        size = len(request.prompt.token_ids)
        name = self._chosen.get(request.number)
        if name is None:
            name = self._chosen[request.number] = min(self._pending, key=self._pending.__getitem__)
            self._pending[name] += size + (0 if self._is_split else 1)
        if name in full or (self._given[name] and self._given[name] + size > MOST_BATCH_TOKENS):
            full.add(name)
            return None
        self._given[name] += size
        return name

    def stepped(self, replica: str, plan: StepPlan, seconds: float, answers: Sequence[int]) -> None:
        """Notes which prompts are computed, and which answers have ended."""
        if replica in self._num_answers:
            self._num_answers[replica] -= len(answers)
            return
        num_prompt = sum(chunk.num_tokens for chunk in plan.chunks if not chunk.is_decode)
        self._given[replica] -= num_prompt
        self._pending[replica] -= num_prompt + (0 if self._is_split else len(answers))

    def transferred(self, prefill: str, replica: str, *, num_tokens: int, num_bytes: int, exposed_s: float) -> None:
        """Learns nothing: nothing is sent."""

    def transfer_failed(self, prefill: str, replica: str) -> None:
        """Learns nothing: nothing is sent."""


class SplitLoad(OpenLoop):
    """Lets each prompt be followed by its answer, as a request of its own with a negative number, once its keys and
    values are there.
    """

    def __init__(self, trace: Trace) -> None:
        super().__init__(
            Request(number=number, at_s=at_s, prompt_tokens=prompt, answer_tokens=1)
            for number, (at_s, prompt, _) in enumerate(trace)
        )
        self._trace = trace

    def ended(self, number: int, now_s: float) -> Request | None:
        """Returns the answer that follows a prompt."""
        if number < 0:
            return None
        _, prompt, answer = self._trace[number]
        if answer == 1:
            return None
        sent_s = now_s + prompt * KV_BYTES_PER_TOKEN / LINK_BYTES_PER_S
        return Request(number=-number - 1, at_s=sent_s, prompt_tokens=1, answer_tokens=answer - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """The times of one request of a trace, in seconds."""

    prompt_tokens: int
    answer_tokens: int
    ttft_s: float
    e2e_s: float

    @property
    def tbt_s(self) -> float:
        return (self.e2e_s - self.ttft_s) / self.answer_tokens


def read_trace(path: Path) -> Trace:
    """Returns when each request came, and the tokens of its prompt and of its answer."""
    return [(float(row["arrival_timestamp"]), int(row["prompt_size"]), int(row["token_size"])) for row in _rows(path)]


def at_rate(trace: Trace, rate: float) -> Trace:
    """Returns the trace in the same rhythm, so that ``rate`` requests come in a second."""
    factor = len(trace) / (trace[-1][0] * rate)
    return [(at_s * factor, prompt, answer) for at_s, prompt, answer in trace]


def _rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(gzip.decompress(path.read_bytes()).decode().splitlines()))


def serve(design: Design, machines: Mapping[str, Machine], trace: Trace) -> tuple[list[Served], Result]:
    """Serves a trace by the machines of a design."""
    prompts, tokens = _names("prompt", design.prompt), _names("token", design.token)
    replicas = [_replica(name, machines[design.prompt[0]]) for name in prompts]
    if design.token is not None:
        replicas += [_replica(name, machines[design.token[0]]) for name in tokens]
    load = OpenLoop(_requests(trace)) if design.token is None else SplitLoad(trace)
    limits = ReplicaLimits(block_size=_BLOCK_SIZE, token_budget=_UNCUT, max_num_seqs=512, prefix_cache=False)
    result = Simulation(Fleet(replicas=replicas), load, PendingTokens(prompts, tokens, limits)).run()
    outcomes = {outcome.number: outcome for outcome in result.outcomes if outcome.is_served}
    served = []
    for number, (_, prompt, answer) in enumerate(trace):
        first, last = outcomes[number], outcomes.get(-number - 1, outcomes[number])
        e2e_s = last.last_s - first.arrived_s
        served.append(Served(prompt_tokens=prompt, answer_tokens=answer, ttft_s=first.ttft_s, e2e_s=e2e_s))
    return served, result


def _requests(trace: Trace) -> list[Request]:
    return [
        Request(number=number, at_s=at_s, prompt_tokens=prompt, answer_tokens=answer)
        for number, (at_s, prompt, answer) in enumerate(trace)
    ]


def _names(kind: str, group: tuple[str, int] | None) -> list[str]:
    return [] if group is None else [f"{kind}{number:02d}" for number in range(group[1])]


def _replica(name: str, machine: Machine) -> SimulatedReplica:
    settings = CoreSettings(
        limits=Limits(max_context_tokens=_UNCUT, vocab_size=1 << 31, block_size=_BLOCK_SIZE),
        steps=SchedulerLimits(token_budget=_UNCUT, max_num_seqs=512),
        num_blocks=int((MACHINE_BYTES - WEIGHT_BYTES) / KV_BYTES_PER_TOKEN / _BLOCK_SIZE),
        prefix_cache=False,
    )
    return SimulatedReplica(name=name, settings=settings, steps=TokenSteps(machine))


def figures(served: Sequence[Served], idle: Machine) -> dict[str, float]:
    """Returns what the reference has of a design: times relative to those on an idle machine, means and percentiles."""
    prompt_s = np.array([idle.prompt.read(it.prompt_tokens).value for it in served])
    token_s = np.array([idle.token.read(it.prompt_tokens).value for it in served])
    count = np.array([it.answer_tokens for it in served])
    ttft, tbt, e2e = (np.array([getattr(it, name) for it in served]) for name in ("ttft_s", "tbt_s", "e2e_s"))
    ratios = {"ttft": ttft / prompt_s, "tbt": tbt / token_s, "e2e": e2e / (prompt_s + token_s * (count - 1))}
    found = {
        f"{name}_p{percent}": float(np.percentile(values, percent))
        for name, values in ratios.items()
        for percent in (50, 90, 99)
    }
    for name, values in (("ttft", ttft), ("tbt", tbt), ("e2e", e2e)):
        found[f"{name}_mean_s"] = float(values.mean())
        found[f"{name}_p99_s"] = float(np.percentile(values, 99))
    return found


def meets_all(found: Mapping[str, float]) -> bool:
    """Tells whether a design keeps all nine limits of the paper."""
    return all(
        found[f"{name}_p{percent}"] <= limit
        for name, limits in _SLOS.items()
        for percent, limit in zip((50, 90, 99), limits, strict=True)
    )


QUANTILES = tuple(f"{name}_p{percent}" for name in _SLOS for percent in (50, 90, 99))


def read_reference(path: Path) -> dict[str, dict[str, float]]:
    """Returns the figures of the published simulator, by design; ``all9`` tells whether all limits are kept."""
    with path.open(newline="") as file:
        return {
            row["design"]: {
                name: float(value) if name != "all9" else float(value == "True")
                for name, value in row.items()
                if name not in ("trace", "design")
            }
            for row in csv.DictReader(file)
        }


def capacity(design: Design, machines: Mapping[str, Machine], trace: Trace, *, low: float, step: float) -> float:
    """Returns the most requests a second, in steps from ``low`` on, at which a design keeps all nine limits; 0: none.

    The step doubles while the limits are kept, and then halves between what is kept and what is not. More than five
    times ``low`` is not tried.
    """

    def is_kept(rate: float) -> bool:
        served, _ = serve(design, machines, at_rate(trace, rate))
        return meets_all(figures(served, machines[A100]))

    if not is_kept(low):
        return 0.0
    best, width = low, step
    while best + width <= 5 * low and is_kept(best + width):
        best, width = best + width, 2 * width
    while width > step:
        width /= 2
        if is_kept(best + width):
            best += width
    return best
