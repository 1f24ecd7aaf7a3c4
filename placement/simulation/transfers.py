"""Carries keys and values between the replicas of a simulation, from the request for a prompt until they are there."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from placement.serving.events import Cancel, HoldLapsed, KvArrived, KvSent, Receive, SequenceSpec, Ship, Submit
from placement.serving.kv.streaming import QUEUE_S, streams_by_layer
from placement.serving.step_plan import StepPlan
from placement.simulation.clock import VirtualClock
from placement.simulation.network import Network
from placement.simulation.replica import ReplicaDriver


@dataclass(frozen=True, slots=True, kw_only=True)
class KvTraffic:
    """Describes the keys and values that travel.

    Attributes:
        bytes_per_token: bytes of a token's keys and values, of all layers.
        num_layers: how many layers are sent one by one; the last goes when the prompt is computed, the others before.
    """

    bytes_per_token: int = 0
    num_layers: int = 1


@dataclass(slots=True, eq=False, kw_only=True)
class _Transfer:
    """A prompt that one replica computes for another."""

    source: ReplicaDriver
    target: ReplicaDriver
    source_sequence: int
    target_sequence: int
    target_hold: int
    first_token: int
    num_tokens: int
    source_hold: int | None = None  # once its prompt is computed
    computed_s: float = 0.0
    num_flows: int = 0
    late_tokens: int = 0  # of which the last layer is still to be sent
    has_begun: bool = False
    by_layer: bool

    @property
    def is_there(self) -> bool:
        return self.source_hold is not None and not self.num_flows


class Transfers:
    """Keeps what is on its way between replicas.

    Attributes:
        num_events: how many transfers began, and ended.
    """

    def __init__(
        self,
        clock: VirtualClock,
        network: Network,
        traffic: KvTraffic,
        *,
        next_id: Callable[[], int],
        computed: Callable[[int], None],
        came: Callable[[str, str, int, int, float], None],
        failed: Callable[[str, str], None],
    ) -> None:
        """Takes what to call when the prompt of a sequence is computed, and when its keys and values came, with their
        tokens, bytes and delay, or will not come.
        """
        self._clock = clock
        self._network = network
        self._traffic = traffic
        self._next_id = next_id
        self._computed = computed
        self._came = came
        self._failed = failed
        self._open: dict[int, _Transfer] = {}  # by the sequence at the source
        self.num_events = 0

    def receive(self, target: ReplicaDriver, source: ReplicaDriver, command: Receive, prompt: tuple[int, ...]) -> None:
        """Asks a replica to compute a prompt for another, which has reserved blocks for it."""
        self.num_events += 1
        # Whatever the target does in this very moment comes first; ids are given in the order of submission.
        self._clock.after(0.0, partial(self._ask, target, source, command, prompt))

    def _ask(self, target: ReplicaDriver, source: ReplicaDriver, command: Receive, prompt: tuple[int, ...]) -> None:
        sequence_id, tokens = self._next_id(), command.tokens
        self._open[sequence_id] = _Transfer(
            source=source,
            target=target,
            source_sequence=sequence_id,
            target_sequence=command.sequence_id,
            target_hold=command.hold_id,
            first_token=tokens.start,
            num_tokens=tokens.stop,
            by_layer=streams_by_layer(len(tokens)),
        )
        self._clock.after(QUEUE_S, partial(self._give_up_waiting, sequence_id))
        spec = SequenceSpec(prompt_ids=prompt[: tokens.stop], max_tokens=1, ship_to=str(sequence_id))
        source.tell(Submit(sequence_id=sequence_id, spec=spec, submitted_s=self._clock.now_s))

    def begun(self, source: ReplicaDriver, plan: StepPlan, begins_s: float) -> None:
        """Sends layers as a step computes them."""
        if not self._open:
            return
        for sequence_id in plan.preempted:
            self._clock.after(0.0, partial(self._fail, sequence_id))
        for chunk in plan.chunks:
            transfer = self._open.get(chunk.sequence_id)
            if transfer is None:
                continue
            transfer.has_begun = True
            count = max(0, chunk.stop - max(chunk.start, transfer.first_token))
            transfer.late_tokens += count
            layers = self._traffic.num_layers
            if transfer.by_layer and layers > 1 and count:
                early = count * self._traffic.bytes_per_token * (layers - 1) / layers
                transfer.num_flows += 1
                self._clock.at(begins_s, partial(self._send, transfer, early))

    def ship(self, command: Ship) -> None:
        """Sends what is left of a prompt that is computed."""
        transfer = self._open.get(command.sequence_id)
        if transfer is None:
            return
        transfer.source_hold, transfer.computed_s = command.hold_id, self._clock.now_s
        self._computed(transfer.target_sequence)
        layers = self._traffic.num_layers if transfer.by_layer else 1
        # What the source had found computed was in no step: it goes now, all of it.
        found = transfer.num_tokens - transfer.first_token - transfer.late_tokens
        transfer.num_flows += 1
        self._send(transfer, self._traffic.bytes_per_token * (transfer.late_tokens / layers + found))

    def _send(self, transfer: _Transfer, num_bytes: float) -> None:
        done = partial(self._sent, transfer)
        self._network.send(transfer.source.node, transfer.target.node, num_bytes, done)

    def _sent(self, transfer: _Transfer) -> None:
        transfer.num_flows -= 1
        if transfer.is_there and self._open.pop(transfer.source_sequence, None) is not None:
            assert transfer.source_hold is not None
            self.num_events += 1
            count = transfer.num_tokens - transfer.first_token
            exposed_s = self._clock.now_s - transfer.computed_s
            names = transfer.source.spec.name, transfer.target.spec.name
            self._came(*names, count, count * self._traffic.bytes_per_token, exposed_s)
            transfer.target.tell(KvArrived(hold_id=transfer.target_hold, num_tokens=transfer.num_tokens))
            transfer.source.tell(KvSent(hold_id=transfer.source_hold))

    def _give_up_waiting(self, sequence_id: int) -> None:
        transfer = self._open.get(sequence_id)
        if transfer is not None and not transfer.has_begun:
            self._fail(sequence_id)

    def _fail(self, sequence_id: int) -> None:
        """Ends a transfer whose prompt is not computed where it should be: who waits for it computes it."""
        transfer = self._open.pop(sequence_id, None)
        if transfer is None:
            return
        self.num_events += 1
        self._failed(transfer.source.spec.name, transfer.target.spec.name)
        transfer.source.tell(Cancel(sequence_id=sequence_id))
        if transfer.source_hold is not None:
            transfer.source.tell(HoldLapsed(hold_id=transfer.source_hold))
        transfer.target.tell(KvArrived(hold_id=transfer.target_hold, num_tokens=0))
