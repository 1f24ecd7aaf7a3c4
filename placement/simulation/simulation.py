"""Serves the requests of a load by the replicas of a fleet, in virtual time.

Whatever is decided is decided by the code that serves live: a dispatcher routes and binds, cores schedule. Here are
only the events: requests come, steps end, keys and values arrive. The same input gives the same result, to the bit.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count

from placement.serving.events import Command, Ended, Receive, Refused, SequenceSpec, Ship, Submit, Tell
from placement.serving.routing.binding import Waiting, with_request
from placement.serving.routing.choice import ReplicaLoad, Route
from placement.serving.routing.router import Prompt
from placement.serving.step_plan import StepPlan
from placement.simulation.clock import VirtualClock
from placement.simulation.dispatch import Dispatcher
from placement.simulation.load import Load, Request
from placement.simulation.network import Interface, Network
from placement.simulation.replica import ReplicaDriver, SimulatedReplica
from placement.simulation.results import Outcome, Result
from placement.simulation.transfers import KvTraffic, Transfers


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """Describes the replicas that serve, and what connects them.

    Attributes:
        interfaces: the connections of nodes, by name; only replicas that send each other keys and values need one.
        latency_s: seconds that a message takes between nodes.
        contends: whether transfers share the connections.
    """

    replicas: Sequence[SimulatedReplica]
    interfaces: dict[str, Interface] = field(default_factory=dict)
    latency_s: float = 0.0
    contends: bool = True
    traffic: KvTraffic = field(default_factory=KvTraffic)


class Simulation:
    """Serves a load once.

    Args:
        keeps_gaps: whether the time between every two tokens is kept, 8 bytes each.
    """

    def __init__(self, fleet: Fleet, load: Load, dispatcher: Dispatcher, *, keeps_gaps: bool = False) -> None:
        self._clock = VirtualClock()
        self._load = load
        self._dispatcher = dispatcher
        self._keeps_gaps = keeps_gaps
        self._gaps = array("d")
        network = Network(self._clock, fleet.interfaces, latency_s=fleet.latency_s, contends=fleet.contends)
        self._ids = count(1)
        self._transfers = Transfers(
            self._clock,
            network,
            fleet.traffic,
            next_id=self._ids.__next__,
            computed=self._prompt_computed,
            came=self._kv_came,
            failed=dispatcher.transfer_failed,
        )
        self._drivers = {
            spec.name: ReplicaDriver(
                spec, self._clock, begun=self._transfers.begun, ended=self._step_ended, told=self._told
            )
            for spec in fleet.replicas
        }
        self._outcomes: dict[int, Outcome] = {}
        self._prompts: dict[int, tuple[int, ...]] = {}  # of requests that are not bound, or await keys and values
        self._waiting: list[Waiting] = []
        self._served: dict[int, tuple[Outcome, Route]] = {}  # by the sequence that answers
        self._promised: dict[int, tuple[Route, Waiting]] = {}  # prompts that their replica has not been asked for yet
        self._answers: list[int] = []  # lengths of those that end with a step
        self._num_arrivals = 0

    def run(self, *, until_s: float = float("inf")) -> Result:
        """Serves until nothing is left to do, or until ``until_s``."""
        for request in self._load.start():
            self._clock.at(request.at_s, partial(self._arrive, request))
        self._clock.run(until_s=until_s)
        work = {name: driver.work for name, driver in self._drivers.items()}
        handled = sum(it.num_events + it.num_commands for it in work.values())
        return Result(
            outcomes=[self._outcomes[number] for number in sorted(self._outcomes)],
            work=work,
            gaps_s=self._gaps,
            num_events=self._num_arrivals + self._transfers.num_events + handled,
            ended_s=self._clock.now_s,
        )

    def _loads(self) -> list[ReplicaLoad]:
        """Returns the loads of all replicas, with the prompts that they will be asked for."""
        loads = {name: driver.load() for name, driver in self._drivers.items()}
        for route, request in self._promised.values():
            assert route.prefill is not None
            load, prompt = loads[route.prefill], request.prompt
            loads[route.prefill] = with_request(load, route, prompt, self._dispatcher.limits)
        return list(loads.values())

    # -- requests come and go -------------------------------------------------------------------------------------

    def _arrive(self, request: Request) -> None:
        self._num_arrivals += 1
        number = request.number
        self._outcomes[number] = Outcome(
            number=number,
            arrived_s=self._clock.now_s,
            prompt_tokens=request.prompt_tokens,
            answer_tokens=request.answer_tokens,
        )
        prompt = Prompt(token_ids=request.tokens(), max_tokens=request.answer_tokens)
        self._waiting.append(Waiting(number=number, prompt=prompt))
        self._bind()

    def _bind(self) -> None:
        if not self._waiting:
            return
        bound = self._dispatcher.bind(self._waiting, self._loads())
        if not bound:
            return
        going = [request for request in self._waiting if request.number in bound]
        self._waiting = [request for request in self._waiting if request.number not in bound]
        for request in going:
            self._submit(request, bound[request.number])

    def _submit(self, request: Waiting, route: Route) -> None:
        outcome, sequence_id = self._outcomes[request.number], next(self._ids)
        outcome.replica, outcome.prefill = route.replica, route.prefill or ""
        prompt = request.prompt.token_ids
        assert isinstance(prompt, tuple)
        spec = SequenceSpec(prompt_ids=prompt, max_tokens=outcome.answer_tokens, awaits_kv=route.prefill is not None)
        self._served[sequence_id] = (outcome, route)
        if route.prefill is not None:
            self._prompts[sequence_id] = prompt
            self._promised[sequence_id] = (route, request)
        submit = Submit(sequence_id=sequence_id, spec=spec, submitted_s=self._clock.now_s)
        self._drivers[route.replica].tell(submit)

    # -- what replicas say ----------------------------------------------------------------------------------------

    def _told(self, driver: ReplicaDriver, commands: Sequence[Command]) -> None:
        now_s, served = self._clock.now_s, self._served
        for command in commands:
            if isinstance(command, Tell):
                found = served.get(command.sequence_id)
                if found is not None:  # else it is of a prompt for another replica
                    self._give(found[0], command, now_s)
            elif isinstance(command, Ended):
                self._end(command)
            elif isinstance(command, Refused):
                self._refuse(command)
            elif isinstance(command, Receive):
                self._receive(driver, command)
            elif isinstance(command, Ship):
                self._transfers.ship(command)

    def _give(self, outcome: Outcome, command: Tell, now_s: float) -> None:
        if outcome.num_tokens:
            gap_s = now_s - outcome.last_s
            if gap_s > outcome.longest_gap_s:
                outcome.longest_gap_s = gap_s
            if self._keeps_gaps:
                self._gaps.append(gap_s)
        else:
            outcome.first_s = now_s
            self._promised.pop(command.sequence_id, None)
        outcome.last_s = now_s
        outcome.num_tokens += len(command.token_ids)

    def _end(self, command: Ended) -> None:
        found = self._served.pop(command.sequence_id, None)
        if found is None:
            return
        outcome = found[0]
        outcome.num_preemptions = command.num_preemptions
        self._answers.append(outcome.num_tokens)
        self._leave(command.sequence_id, outcome)

    def _refuse(self, command: Refused) -> None:
        found = self._served.pop(command.sequence_id, None)
        assert found is not None, command.error  # what replicas ask of each other is never refused
        found[0].refused = str(command.error)
        self._leave(command.sequence_id, found[0])

    def _leave(self, sequence_id: int, outcome: Outcome) -> None:
        self._prompts.pop(sequence_id, None)
        self._promised.pop(sequence_id, None)
        following = self._load.ended(outcome.number, self._clock.now_s)
        if following is not None:
            self._clock.at(following.at_s, partial(self._arrive, following))

    def _receive(self, driver: ReplicaDriver, command: Receive) -> None:
        sequence_id = command.sequence_id
        self._promised.pop(sequence_id, None)
        prefill = self._served[sequence_id][1].prefill
        assert prefill is not None, command
        self._transfers.receive(driver, self._drivers[prefill], command, self._prompts.pop(sequence_id))

    def _step_ended(self, driver: ReplicaDriver, plan: StepPlan, seconds: float) -> None:
        answers, self._answers = self._answers, []
        self._dispatcher.stepped(driver.spec.name, plan, seconds, answers)
        self._bind()

    def _prompt_computed(self, sequence_id: int) -> None:
        found = self._served.get(sequence_id)
        if found is not None:
            found[0].computed_s = self._clock.now_s

    def _kv_came(self, prefill: str, replica: str, num_tokens: int, num_bytes: int, exposed_s: float) -> None:
        self._dispatcher.transferred(prefill, replica, num_tokens=num_tokens, num_bytes=num_bytes, exposed_s=exposed_s)
        self._bind()
