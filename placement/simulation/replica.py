"""Drives the core of a replica in virtual time: its steps take as long as a model says, and nothing else takes time."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf

from placement.planning.plan import Role
from placement.serving.events import Advance, Command, Event, Run, StepDue, StepEnded
from placement.serving.replica import ReplicaCore
from placement.serving.routing.choice import ReplicaLoad
from placement.serving.settings import CoreSettings
from placement.serving.step_plan import StepPlan
from placement.simulation.clock import VirtualClock
from placement.simulation.step_time import StepModel

AT_ONCE_S = inf
"""The ``lead_s`` of a replica that plans a step as soon as there is room for one, however long the last one takes."""

_STEP_DUE = StepDue()
_NO_TOKEN, _TOKEN = Advance(), Advance(token_ids=(0,))


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedReplica:
    """Describes a replica of a simulation.

    Attributes:
        settings: of its core. With several batches it is a pipeline, whose stages each take an equal part of a step.
        steps: how long its steps take.
        role: what it is for.
        node: the node whose connection its transfers take; its own name where it is empty.
        lead_s: how long before the end of a step the next is planned; what comes later has to wait for the one after.
    """

    name: str
    settings: CoreSettings
    steps: StepModel
    role: Role = Role.MIXED
    node: str = ""
    lead_s: float = 0.0


@dataclass(slots=True, kw_only=True)
class Work:
    """Counts what a replica has done.

    Attributes:
        busy_s: seconds in which a step was computed.
        num_extrapolated_steps: steps that lie beyond what was measured.
        extrapolated_s: their seconds.
        busy_spans: the beginning and end of each time without a pause, where they are kept.
    """

    num_steps: int = 0
    num_tokens: int = 0
    num_commands: int = 0
    num_events: int = 0
    busy_s: float = 0.0
    num_extrapolated_steps: int = 0
    extrapolated_s: float = 0.0
    busy_spans: list[tuple[float, float]] = field(default_factory=list)


Told = Callable[["ReplicaDriver", Sequence[Command]], None]
Ran = Callable[["ReplicaDriver", StepPlan, float], None]


class ReplicaDriver:
    """Drives one core, as :mod:`workers.engine.loop` does where it is real.

    Attributes:
        work: what it has done so far.
    """

    def __init__(self, spec: SimulatedReplica, clock: VirtualClock, *, begun: Ran, ended: Ran, told: Told) -> None:
        """Takes what to call when a step begins, once it has ended, and with every command but those to run a step."""
        self.spec = spec
        self.core = ReplicaCore(spec.settings)
        self.work = Work()
        self._clock = clock
        self._begun, self._ended, self._told = begun, ended, told
        self._dispatched: deque[tuple[StepPlan, float]] = deque()
        self._stage_free_s = [0.0] * spec.settings.steps.num_batches
        self._wakes_s = -1.0  # when it looks for a step next, if it does
        self._load: ReplicaLoad | None = None  # until something happens

    @property
    def node(self) -> str:
        """Returns the node whose connection its transfers take."""
        return self.spec.node or self.spec.name

    def load(self) -> ReplicaLoad:
        """Returns its load, as its leader reports it."""
        if self._load is None:
            now, settings = self.core.load(), self.spec.settings
            self._load = ReplicaLoad(
                name=self.spec.name,
                accepting=True,
                pending_tokens=now.pending_tokens,
                num_running=now.num_running,
                num_waiting=now.num_waiting,
                free_blocks=now.free_blocks,
                total_blocks=now.total_blocks,
                token_budget=settings.steps.token_budget,
                role=self.spec.role,
                block_size=settings.limits.block_size,
                num_moving=now.num_moving,
            )
        return self._load

    def tell(self, event: Event) -> None:
        """Hands an event to the core, carries out what follows, and runs a step where one is due."""
        self._carry_out(self._handle(event))
        self.plan()

    def plan(self) -> None:
        """Has the next steps planned, as far as it is time for them."""
        core = self.core
        while core.wants_step and (not self._dispatched or self._is_due()):
            commands = self._handle(_STEP_DUE)
            if not commands:
                continue  # the core wants no step any more, or has made room for one
            run = commands[-1]
            if isinstance(run, Run):  # it is always the last
                commands.pop()
                self._run(run)
            self._carry_out(commands)

    def _is_due(self) -> bool:
        """Tells whether the step after those on their way is planned now; if not, looks again when it is time."""
        if len(self._stage_free_s) > 1 or self.spec.lead_s == AT_ONCE_S:
            return True
        if self.spec.lead_s <= 0.0:
            return False  # when the step ends
        due_s = self._stage_free_s[0] - self.spec.lead_s
        if due_s <= self._clock.now_s:
            return True
        if self._wakes_s != due_s:
            self._wakes_s = due_s
            self._clock.at(due_s, self.plan)
        return False

    def _run(self, command: Run) -> None:
        plan, work, free_s = command.plan, self.work, self._stage_free_s
        seconds, is_measured = self.spec.steps.step_time(plan.chunks)
        work.num_steps += 1
        if not is_measured:
            work.num_extrapolated_steps += 1
            work.extrapolated_s += seconds
        begins_s = at_s = max(self._clock.now_s, free_s[0])
        part_s = seconds / len(free_s)
        for stage in range(len(free_s)):
            at_s = free_s[stage] = max(at_s, free_s[stage]) + part_s
        work.busy_s += part_s  # of the first stage: all have as much to do
        self._note_busy(begins_s, begins_s + part_s)
        self._dispatched.append((plan, seconds))
        self._clock.at(at_s, self._end_step)
        self._begun(self, plan, begins_s)

    def _note_busy(self, begins_s: float, ends_s: float) -> None:
        spans = self.work.busy_spans
        if spans and begins_s <= spans[-1][1]:
            spans[-1] = (spans[-1][0], ends_s)
        else:
            spans.append((begins_s, ends_s))

    def _end_step(self) -> None:
        plan, seconds = self._dispatched.popleft()
        advances = [_TOKEN if chunk.samples else _NO_TOKEN for chunk in plan.chunks]
        self.work.num_tokens += len(advances)
        commands = self._handle(StepEnded(step=plan.step, advances=advances))
        self._told(self, commands)
        self._ended(self, plan, seconds)
        self.plan()

    def _handle(self, event: Event) -> list[Command]:
        commands = self.core.handle(event, self._clock.now_s)
        self._load = None
        self.work.num_events += 1
        self.work.num_commands += len(commands)
        return commands

    def _carry_out(self, commands: Sequence[Command]) -> None:
        if commands:
            self._told(self, commands)
