"""A world around a replica's core: it executes steps, carries keys and values, and knows what must come of it.

A slot of KV memory holds a digest of the whole text up to its token, as keys and values depend on it. Each step checks
what it reads when it executes, which may be well after it was planned. The next token is a function of the text, so the
answer of every sequence is known beforehand, whoever computes it.
"""

import copy
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from placement.serving.events import (
    Advance,
    Cancel,
    Command,
    Drain,
    Ended,
    EndReason,
    Event,
    HoldLapsed,
    KvArrived,
    KvLost,
    KvSent,
    Receive,
    Refused,
    Revoke,
    Run,
    SequenceSpec,
    Ship,
    StepDue,
    StepEnded,
    StepLost,
    Submit,
    Tell,
)
from placement.serving.log import RecordedCore
from placement.serving.replica import LATE_TRANSFER
from placement.serving.sequence import Phase
from placement.serving.settings import CoreSettings

VOCAB_SIZE = 7
STOP = 6
LEASE_S = 10.0
_GARBAGE = -1


def next_token(token_ids: Sequence[int]) -> int:
    """What follows a text."""
    return (3 * sum(token_ids) + 5 * len(token_ids) + token_ids[-1]) % VOCAB_SIZE


def continuation(token_ids: Sequence[int], count: int) -> list[int]:
    """The ``count`` tokens that follow a text."""
    text = list(token_ids)
    for _ in range(count):
        text.append(next_token(text))
    return text[len(token_ids) :]


@dataclass(kw_only=True)
class Text:
    """A sequence, all its tokens as far as they are executed, and what was said of it."""

    spec: SequenceSpec
    emitted: list[int]
    tokens: list[int]
    told: list[int] = field(default_factory=list)
    ended: Ended | None = None
    refused: bool = False
    causes: set[tuple[EndReason, str]] = field(default_factory=set)  # why it may have ended without a full answer

    def digest(self, count: int) -> int:
        """What the slot of token ``count - 1`` holds."""
        return hash((self.spec.cache_salt, tuple(self.tokens[:count])))


@dataclass(kw_only=True)
class _Step:
    run: Run
    tables: list[list[int]]  # of the moment at which it was dispatched


class World:
    """Drives a core. Every method is something that can happen; none of them needs the others to have happened."""

    def __init__(self, settings: CoreSettings, *, tokens_a_step: int = 1) -> None:
        """``tokens_a_step``: the most that a step gives a sequence; more than one only in a pipeline."""
        self.core = RecordedCore(settings)
        self.is_pipeline = settings.steps.num_batches > 1
        self.tokens_a_step = tokens_a_step
        self.now_s = 0.0
        self.texts: dict[int, Text] = {}
        self.memory: dict[int, int] = {}
        self.steps: deque[_Step] = deque()
        self.incoming: dict[int, Receive] = {}
        self.outgoing: dict[int, Ship] = {}
        self.since_s: dict[int, float] = {}  # when each transfer began
        self.names: dict[int, int] = {}  # at attention workers: the digest of what each named block held, by block
        self.named: dict[bytes, int] = {}
        residency = settings.residency
        self.num_local_blocks = settings.num_blocks if residency is None else residency.num_local_blocks
        self.spoiled: set[int] = set()  # transfers from here whose keys and values are gone
        self.lost = False
        self.reached: set[str] = set()  # what has happened, in words

    # -- what can happen ------------------------------------------------------------------------------------------

    def submit(self, spec: SequenceSpec, num_emitted: int = 0, *, admitted: bool = True) -> int:
        """A sequence comes, ``num_emitted`` tokens of whose answer were given elsewhere."""
        sequence_id = len(self.texts)
        emitted = continuation(spec.prompt_ids, num_emitted)
        causes = {(EndReason.FAILED, "on fire")} if self.lost else set()
        self.texts[sequence_id] = Text(spec=spec, emitted=emitted, tokens=[*spec.prompt_ids, *emitted], causes=causes)
        self._tell(
            Submit(
                sequence_id=sequence_id,
                spec=spec,
                submitted_s=self.now_s,
                emitted_ids=tuple(emitted),
                admitted=admitted,
            )
        )
        return sequence_id

    def cancel(self, sequence_id: int) -> None:
        """Nobody wants a sequence any more."""
        self.texts[sequence_id].causes.add((EndReason.CANCELLED, ""))
        self._tell(Cancel(sequence_id=sequence_id))

    def drain(self) -> None:
        """The replica is to take nothing new."""
        self._tell(Drain())

    def plan(self) -> bool:
        """It is time for a step. Says whether there was one."""
        before = len(self.steps)
        self._tell(StepDue())
        if len(self.steps) > before:
            return True
        if self.core.phases() and len(self.steps) < 2 and not self.core.wants_step:
            # It says that there is nothing to compute: so there must be nothing.
            assert not copy.deepcopy(self.core.scheduler).schedule().chunks
        return False

    def end_step(self, *, fails_at: int | None = None) -> None:
        """The oldest step executes and ends; the sequence of chunk ``fails_at`` can not be sampled."""
        if not self.steps:
            return
        step = self.steps.popleft()
        advances = self._execute(step)
        if fails_at is not None and fails_at < len(advances) and step.run.plan.chunks[fails_at].samples:
            advances[fails_at] = Advance(failed="no token")
            text = self.texts[step.run.plan.chunks[fails_at].sequence_id]
            text.causes.add((EndReason.FAILED, "no token"))
        self._tell(StepEnded(step=step.run.plan.step, advances=tuple(advances)))

    def lose(self) -> None:
        """The oldest step failed."""
        self.steps.clear()
        self.lost = True
        for text in self.texts.values():
            text.causes.add((EndReason.FAILED, "on fire"))
        self._tell(StepLost(cause="on fire"))

    def lose_kv(self) -> None:
        """All keys and values are lost, and the steps that were to execute with them."""
        in_flight = {chunk.sequence_id for step in self.steps for chunk in step.run.plan.chunks}
        for sequence_id, text in self.texts.items():
            phase = self.core.phase(sequence_id)
            if phase is None:
                continue
            self.reached.add(f"KV lost in {phase.value}{', in flight' if sequence_id in in_flight else ''}")
            if text.spec.ship_to is not None and phase is not Phase.WAITING:
                text.causes.add((EndReason.FAILED, "gone"))
        self.steps.clear()
        self.memory.clear()
        self.names.clear()
        self.spoiled |= set(self.outgoing)
        self._tell(KvLost(cause="gone"))
        assert self.lost or (not self.core.pool.num_cached and self.core.phases() <= {Phase.WAITING})

    def receive(self, hold_id: int, num_tokens: int) -> None:
        """Keys and values of the first ``num_tokens`` came."""
        request = self.incoming.pop(hold_id)
        text = self.texts[request.sequence_id]
        self.reached.add("received all" if num_tokens == request.tokens.stop else "received some")
        for position in range(request.tokens.start, num_tokens):
            self.memory[self._slot(request.table, position)] = text.digest(position + 1)
        self._tell(KvArrived(hold_id=hold_id, num_tokens=num_tokens))

    def sent(self, hold_id: int) -> None:
        """The other replica has all keys and values: they are what they should be."""
        order = self.outgoing.pop(hold_id)
        if hold_id not in self.spoiled:
            self._read(self.texts[order.sequence_id], order.table, order.tokens.stop)
        self._tell(KvSent(hold_id=hold_id))

    def wait(self, seconds: float) -> None:
        """Time passes, and leases with it."""
        self.now_s += seconds
        for hold_id in [key for key, since_s in self.since_s.items() if self.now_s - since_s >= LEASE_S]:
            if hold_id not in self.incoming and hold_id not in self.outgoing:
                continue
            event = HoldLapsed(hold_id=hold_id)
            self.incoming.pop(hold_id, None)
            order = self.outgoing.pop(hold_id, None)
            if order is not None:
                self.texts[order.sequence_id].causes.add((EndReason.FAILED, LATE_TRANSFER))
            self.reached.add("a late send" if order is not None else "a late receipt")
            self._tell(event)

    def repeat_old_transfer(self, hold_id: int) -> None:
        """Something is heard of a transfer that is over."""
        assert hold_id not in self.incoming and hold_id not in self.outgoing
        for event in (KvArrived(hold_id=hold_id, num_tokens=1), KvSent(hold_id=hold_id), HoldLapsed(hold_id=hold_id)):
            self._tell(event)

    def settle(self) -> None:
        """Everything ends, within the steps that its tokens can need."""
        most = sum(len(t.spec.prompt_ids) + t.spec.max_tokens for t in self.texts.values() if t.ended is None)
        for _ in range((most + 2) ** 2 + len(self.incoming) + len(self.outgoing)):
            if self.core.is_idle:
                break
            self._scribble()
            self.plan()
            if self.steps:
                self.end_step()
            elif self.incoming:
                hold_id = next(iter(self.incoming))
                self.receive(hold_id, self.incoming[hold_id].tokens.stop)
            elif self.outgoing:
                self.sent(next(iter(self.outgoing)))
        self.check_all()

    # -- what must hold -------------------------------------------------------------------------------------------

    def check_all(self) -> None:
        """Everything has ended, with the answer that it must have, said once; nothing is kept."""
        for text in self.texts.values():
            assert text.refused or text.ended is not None, text
            self._check_answer(text)
        load = self.core.load()
        self.reached |= {"preempted"} if load.num_preemptions else set()
        self.reached |= {"found a prefix"} if load.prefix_hits else set()
        assert self.core.is_idle
        assert self.core.pool.num_free == self.core.pool.num_total

    def _check_answer(self, text: Text) -> None:
        spec = text.spec
        room = spec.max_tokens - len(text.emitted)
        expected = continuation([*spec.prompt_ids, *text.emitted], room)
        stops = [index for index, token in enumerate(expected) if token in spec.stop_token_ids]
        expected = expected[: stops[0] + 1] if stops else expected
        assert text.told == expected[: len(text.told)], (text, expected)
        if text.ended is None:
            assert not text.told
        elif text.ended.reason in (EndReason.STOP, EndReason.LENGTH, EndReason.SHIPPED):
            assert text.told == expected, (text, expected)
            assert (text.ended.reason is EndReason.STOP) == bool(stops), text
            assert (text.ended.reason is EndReason.SHIPPED) == (spec.ship_to is not None and not stops), text
        else:
            assert (text.ended.reason, text.ended.detail) in text.causes, text

    # -- commands -------------------------------------------------------------------------------------------------

    def _tell(self, event: Event) -> None:
        self.now_s += 0.001
        before = self._phase_of(event)
        commands = self.core.handle(event, self.now_s)
        self.reached.add(f"{type(event).__name__} in {before}" if before else type(event).__name__)
        self.reached |= {f"{phase.value} was reached" for phase in self.core.phases()}
        for command in commands:
            self.reached.add(type(command).__name__)
            self._obey(command)

    def _phase_of(self, event: Event) -> str:
        """The phase of the sequence that is cancelled."""
        phase = self.core.phase(event.sequence_id) if isinstance(event, Cancel) else None
        return "" if phase is None else phase.value

    def _obey(self, command: Command) -> None:
        match command:
            case Run():
                tables = [list(table) for table in command.tables]
                self.steps.append(_Step(run=command, tables=tables))
            case Tell():
                text = self.texts[command.sequence_id]
                assert text.ended is None, "nothing is said after the end"
                assert command.first_index == len(text.emitted) + len(text.told), (command, text)
                assert (command.queue_s is not None) == (not text.told)
                text.told += command.token_ids
            case Ended():
                text = self.texts[command.sequence_id]
                assert text.ended is None, "a sequence ends once"
                text.ended = command
                self.reached.add(f"ended: {command.reason.value}")
            case Refused():
                self.texts[command.sequence_id].refused = True
                self.reached.add(f"refused: {type(command.error).__name__}")
            case Revoke():
                assert command.hold_id in self.incoming or command.hold_id in self.outgoing, "of an open transfer"
            case Receive():
                self.incoming[command.hold_id] = command
                self.since_s[command.hold_id] = self.now_s
            case Ship():
                self.outgoing[command.hold_id] = command
                self.since_s[command.hold_id] = self.now_s

    # -- memory ---------------------------------------------------------------------------------------------------

    def _execute(self, step: _Step) -> list[Advance]:
        self._scribble()
        self._learn_names(step)
        jobs = list(zip(step.run.plan.chunks, step.run.token_ids, step.tables, strict=True))
        for chunk, known, table in jobs:
            text = self.texts[chunk.sequence_id]
            assert list(known) == text.tokens[chunk.start : chunk.stop][: len(known)]
            assert len(known) >= chunk.num_tokens - 1
            self._read(text, table, chunk.start)
        for chunk, _, table in jobs:
            text = self.texts[chunk.sequence_id]
            for position in range(chunk.start, chunk.stop):
                self.memory[self._slot(table, position)] = text.digest(position + 1)
        advances: list[Advance] = []
        for chunk, _, table in jobs:  # nobody wrote to what a batch-mate reads
            text = self.texts[chunk.sequence_id]
            self._read(text, table, chunk.stop)
            advances.append(self._sample(text) if chunk.samples else Advance())
            if len(advances[-1].token_ids) > 1:
                self.reached.add("several tokens")
            assert not chunk.samples or chunk.stop + len(advances[-1].token_ids) == len(text.tokens)
        return advances

    def _learn_names(self, step: _Step) -> None:
        """Attention workers learn which blocks can be found, once what is in them is computed, and which cannot."""
        size, run = self.core.pool.block_size, step.run
        for block in run.forgotten:
            self.names.pop(block, None)
        for block, name in run.names:
            assert block >= self.num_local_blocks, "who loses a local block has no use for its name"
            digest = self.memory[block * size + size - 1]
            assert self.named.setdefault(name, digest) == digest, "one name, one text"
            self.names[block] = digest
            self.reached.add("named")
        for chunk, table in zip(run.plan.chunks, step.tables, strict=True):
            for position in range(chunk.start, chunk.stop):
                assert table[position // size] not in self.names, "a block is forgotten before it is written"
        for block, digest in self.names.items():
            assert self.memory[block * size + size - 1] == digest, "a name tells what is in the block"

    def _sample(self, text: Text) -> Advance:
        given = continuation(text.tokens, self.tokens_a_step)
        text.tokens += given
        return Advance(token_ids=tuple(given))

    def _read(self, text: Text, table: Sequence[int], num_tokens: int) -> None:
        found = [self.memory.get(self._slot(table, position)) for position in range(num_tokens)]
        assert found == [text.digest(position + 1) for position in range(num_tokens)], text

    def _scribble(self) -> None:
        """Keys and values that are on the way are written at any time, as long as their lease lasts."""
        for request in self.incoming.values():
            for position in range(request.tokens.start, request.tokens.stop):
                self.memory[self._slot(request.table, position)] = _GARBAGE

    def _slot(self, table: Sequence[int], position: int) -> int:
        size = self.core.pool.block_size
        return table[position // size] * size + position % size
